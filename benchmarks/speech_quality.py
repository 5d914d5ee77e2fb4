"""How well a model speaks English: what recognisers hear, end of speech, lengths, loops, voice.

Runs the offline engine on the sentences of ``tests/quality/sentences.tsv``, each of which has the
length that the model's teacher gave it. Pocketsphinx judges always; ``--whisper`` names a folder
with a CTranslate2 model; ``--opinion`` adds DNSMOS and the likeness to the codec round trip.

    python -m benchmarks.speech_quality --seeds 0 1 2 3 4
    python -m benchmarks.speech_quality --model DIR --num-sentences 20 --json out.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks._judges import (
    ClosedVocabularyRecogniser,
    FreeRecogniser,
    Samples,
    count_word_errors,
    dnsmos,
    longest_loop_s,
    normal_words,
    voice_similarity,
)
from benchmarks._report import ROOT, format_table, write_json
from vllm.entrypoints.llm import LLM
from vllm.outputs import FinishReason, SpeechOutput
from vllm.prompts import SpeechPrompt
from vllm.sampling_params import SamplingParams

SENTENCES = ROOT / "tests" / "quality" / "sentences.tsv"
_FRAME_RATE = 25.0
_LOOP_S = 2.0  # a repeated pattern longer than this is a loop
_SILENCE = 0.01  # of full scale
_NUM_GRAMMAR_SENTENCES = 20_000


@dataclass(frozen=True)
class Sentence:
    """A text and the seconds that the teacher takes for it."""

    text: str
    teacher_s: float


@dataclass(frozen=True)
class Take:
    """A sentence as the model spoke it."""

    sentence: Sentence
    seed: int
    output: SpeechOutput


def read_sentences(path: Path = SENTENCES) -> list[Sentence]:
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [Sentence(text, float(seconds)) for text, seconds in rows]


def grammar_sentences() -> list[str]:
    """Sentences of the kind that is judged, for the closed vocabulary."""
    from training.text import TextSource, load_vocabulary

    source = TextSource(np.random.default_rng(5), load_vocabulary(), ["one"])
    return [source.sentence() for _ in range(_NUM_GRAMMAR_SENTENCES)]


def speak(
    llm: LLM, sentences: Sequence[Sentence], seeds: Sequence[int], **sampling: Any
) -> list[Take]:
    """All sentences with all seeds, in one batch."""
    pairs = [(sentence, seed) for seed in seeds for sentence in sentences]
    outputs = llm.generate(
        [SpeechPrompt(text=sentence.text) for sentence, _ in pairs],
        [SamplingParams(seed=seed, **sampling) for _, seed in pairs],
        use_tqdm=False,
    )
    return [Take(*pair, output) for pair, output in zip(pairs, outputs, strict=True)]


def word_error_rate(
    recogniser: ClosedVocabularyRecogniser | FreeRecogniser,
    spoken: Sequence[tuple[str, Samples]],
    sample_rate: int,
) -> float:
    """Errors per word over (text, samples) pairs."""
    errors = words = 0
    for text, samples in spoken:
        wanted = normal_words(text)
        errors += count_word_errors(wanted, recogniser.words(samples, sample_rate))
        words += len(wanted)
    return errors / words


def figures_of(takes: Sequence[Take]) -> dict[str, float]:
    """What needs no judge: end of speech, lengths, loops, silence."""
    ratios = [len(t.output.audio) / t.output.sample_rate / t.sentence.teacher_s for t in takes]
    loops = [longest_loop_s(t.output.codes, frame_rate=_FRAME_RATE) for t in takes]
    samples = np.concatenate([t.output.audio for t in takes])
    return {
        "end of speech": mean(t.output.finish_reason is FinishReason.STOP for t in takes),
        "length ratio": mean(ratios),
        "shortest": min(ratios),
        "longest": max(ratios),
        "loops": sum(loop > _LOOP_S for loop in loops),
        "silence share": float((np.abs(samples) < _SILENCE).mean()),
    }


def opinions_of(takes: Sequence[Take], voice: Samples) -> dict[str, float]:
    """Judges' opinions of the sound; ``voice`` is a codec round trip of the same voice."""
    rate = takes[0].output.sample_rate
    return {
        "DNSMOS": mean(dnsmos(take.output.audio, rate) for take in takes),
        "likeness": mean(voice_similarity(take.output.audio, voice, rate) for take in takes),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder with lm and codec; default: the embedded model")
    parser.add_argument("--num-sentences", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--whisper", type=Path, help="folder of a CTranslate2 model")
    parser.add_argument("--opinion", type=Path, help="wav with a codec round trip of the voice")
    parser.add_argument("--wavs", type=Path, help="folder to write the takes of the first seed to")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    folders = {}
    if args.model is not None:
        folders = {"model": f"{args.model}/lm", "audio_tokenizer": f"{args.model}/codec"}
        if Path(args.model, "voices").is_dir():
            folders["voices_dir"] = f"{args.model}/voices"
    llm = LLM(device="cpu", **folders)
    sentences = read_sentences()[: args.num_sentences]
    began = time.process_time()
    takes = speak(llm, sentences, args.seeds, **sampling)
    seconds = sum(len(take.output.audio) for take in takes) / takes[0].output.sample_rate
    figures = {"takes": len(takes), "CPU s per s": (time.process_time() - began) / seconds}
    llm.shutdown()
    rate = takes[0].output.sample_rate
    spoken = [(take.sentence.text, take.output.audio) for take in takes]
    closed = ClosedVocabularyRecogniser(grammar_sentences())
    figures |= figures_of(takes)
    figures["WER, closed vocabulary"] = word_error_rate(closed, spoken, rate)
    if args.whisper:
        figures["WER, Whisper"] = word_error_rate(FreeRecogniser(args.whisper), spoken, rate)
    if args.opinion:
        from vllm.audio import read_wav

        figures |= opinions_of(takes, read_wav(args.opinion.read_bytes())[0])
    print(format_table(["figure", "value"], list(figures.items())))
    if args.wavs:
        _write_wavs(args.wavs, takes[: len(sentences)])
    if args.json:
        write_json(args.json, {"figures": figures})


def _write_wavs(folder: Path, takes: Sequence[Take]) -> None:
    from vllm.audio import encode_all, lookup

    folder.mkdir(parents=True, exist_ok=True)
    for index, take in enumerate(takes):
        data = encode_all(take.output.audio, lookup("wav"), sample_rate=take.output.sample_rate)
        (folder / f"{index:02}.wav").write_bytes(data)


if __name__ == "__main__":
    main()
