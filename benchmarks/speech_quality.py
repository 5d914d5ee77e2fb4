"""How well a model speaks English: what recognisers hear, end of speech, lengths, loops, voice.

Runs the offline engine on the sentences of ``tests/quality/sentences.tsv``, each of which has the
length that the model's teacher gave it. Pocketsphinx judges always; ``--whisper`` names a folder
with a CTranslate2 model; ``--opinion`` adds DNSMOS and the likeness of the voice to the codec round
trip of the teacher's. ``--round-trip`` judges that round trip instead of the model.

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
import torch
from numpy.typing import NDArray

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
from vllm.checkpoints.embedded import embedded_checkpoint
from vllm.entrypoints.llm import LLM
from vllm.model_executor.codecs import Codec, load_codec
from vllm.outputs import FinishReason
from vllm.prompts import SpeechPrompt
from vllm.sampling_params import SamplingParams

SENTENCES = ROOT / "tests" / "quality" / "sentences.tsv"
_TEACHER_CODES = SENTENCES.with_name("teacher_codes.npz")
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
    """A sentence as it was spoken."""

    sentence: Sentence
    samples: Samples
    codes: NDArray[np.int16]  # [num_codebooks, num_frames]
    sample_rate: int
    has_ended: bool = True  # by itself


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
    return [
        Take(
            sentence,
            output.audio,
            np.asarray(output.codes),
            output.sample_rate,
            output.finish_reason is FinishReason.STOP,
        )
        for (sentence, _), output in zip(pairs, outputs, strict=True)
    ]


def round_trips(codec: Codec, sentences: Sequence[Sentence]) -> list[Take]:
    """The first sentences as the codec makes them from the teacher's codes."""
    with np.load(_TEACHER_CODES) as raw:
        each = np.split(raw["codes"], np.cumsum(raw["num_frames"])[:-1])
    takes = []
    for sentence, codes in zip(sentences, each, strict=False):
        samples = codec.decode(torch.from_numpy(codes.T.astype(np.int64))[None])[0]
        takes.append(Take(sentence, samples.numpy(), codes.T, codec.sample_rate))
    return takes


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
    ratios = [len(take.samples) / take.sample_rate / take.sentence.teacher_s for take in takes]
    loops = [longest_loop_s(take.codes, frame_rate=_FRAME_RATE) for take in takes]
    samples = np.concatenate([take.samples for take in takes])
    return {
        "end of speech": mean(take.has_ended for take in takes),
        "length ratio": mean(ratios),
        "shortest": min(ratios),
        "longest": max(ratios),
        "loops": sum(loop > _LOOP_S for loop in loops),
        "silence share": float((np.abs(samples) < _SILENCE).mean()),
    }


def opinions_of(takes: Sequence[Take], voice: Samples) -> dict[str, float]:
    """Judges' opinions of the sound; ``voice`` is a codec round trip of the same voice."""
    rate = takes[0].sample_rate
    return {
        "DNSMOS": mean(dnsmos(take.samples, rate) for take in takes),
        "likeness": mean(voice_similarity(take.samples, voice, rate) for take in takes),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        type=Path,
        default=embedded_checkpoint(),
        help="folder with lm, codec and voices; default: the embedded model",
    )
    parser.add_argument("--num-sentences", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--whisper", type=Path, help="folder of a CTranslate2 model")
    parser.add_argument("--opinion", action="store_true", help="ask judges of the sound too")
    parser.add_argument("--round-trip", action="store_true", help="judge the teacher's codes")
    parser.add_argument("--wavs", type=Path, help="folder to write the takes of the first seed to")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    figures = judge(args)
    print(format_table(["figure", "value"], list(figures.items())))
    if args.json:
        write_json(args.json, {"figures": figures})


def judge(args: argparse.Namespace) -> dict[str, float]:
    """Figures of a run, by name."""
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    sentences = read_sentences()[: args.num_sentences]
    references = round_trips(load_codec(args.model / "codec", device="cpu"), sentences)
    rate = references[0].sample_rate
    figures: dict[str, float] = {}
    if args.round_trip:
        takes = references
    else:
        llm = LLM(
            args.model / "lm",
            audio_tokenizer=args.model / "codec",
            voices_dir=args.model / "voices",
            device="cpu",
        )
        began = time.process_time()
        takes = speak(llm, sentences, args.seeds, **sampling)
        seconds = sum(len(take.samples) for take in takes) / rate
        figures["CPU s per s"] = (time.process_time() - began) / seconds
        llm.shutdown()
    figures["takes"] = len(takes)
    spoken = [(take.sentence.text, take.samples) for take in takes]
    closed = ClosedVocabularyRecogniser(grammar_sentences())
    figures |= figures_of(takes)
    figures["WER, closed vocabulary"] = word_error_rate(closed, spoken, rate)
    if args.whisper:
        figures["WER, Whisper"] = word_error_rate(FreeRecogniser(args.whisper), spoken, rate)
    if args.opinion:
        figures |= opinions_of(takes, np.concatenate([each.samples for each in references]))
    if args.wavs:
        _write_wavs(args.wavs, takes[: len(sentences)])
    return figures


def _write_wavs(folder: Path, takes: Sequence[Take]) -> None:
    from vllm.audio import encode_all, lookup

    folder.mkdir(parents=True, exist_ok=True)
    for index, take in enumerate(takes):
        data = encode_all(take.samples, lookup("wav"), sample_rate=take.sample_rate)
        (folder / f"{index:02}.wav").write_bytes(data)


if __name__ == "__main__":
    main()
