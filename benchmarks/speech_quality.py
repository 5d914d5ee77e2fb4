"""How well a model speaks English: what recognisers hear, end of speech, lengths, loops, voice.

Runs the offline engine on the sentences of ``tests/quality/sentences.tsv``, each of which has the
length that the model's teacher gave it: all sentences with all seeds in one batch, and some one
after the other for the times of single requests. Pocketsphinx judges always; ``--whisper`` names a
folder with a CTranslate2 model; ``--opinion`` adds DNSMOS and the likeness of the voice to the codec
round trip of the teacher's. ``--round-trip`` judges that round trip instead of the model. With
``VLLM_NATIVE=0`` the times are those of torch.

    python -m benchmarks.speech_quality --seeds 0 1 2 3 4
    python -m benchmarks.speech_quality --model DIR --num-sentences 20 --json out.json
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._judges import (
    ROOM_NOISE,
    ClosedVocabularyRecogniser,
    FreeRecogniser,
    Judge,
    Listeners,
    Samples,
    VoiceJudge,
    ask,
    count_word_errors,
    longest_loop_s,
    normal_words,
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
_SILENCE = 0.01  # of full scale, root mean square of a frame
_FRAME = 960  # samples
_NUM_WARM_UP = 2
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
    seed: int | None = None

    @property
    def length_ratio(self) -> float:
        """Its length to the teacher's."""
        return len(self.samples) / self.sample_rate / self.sentence.teacher_s

    @property
    def loop_s(self) -> float:
        return longest_loop_s(self.codes, frame_rate=_FRAME_RATE)


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
            seed,
        )
        for (sentence, seed), output in zip(pairs, outputs, strict=True)
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


def cost_of_single_requests(llm: LLM, sentences: Sequence[Sentence]) -> dict[str, float]:
    """CPU and wall seconds per second of speech, one request after the other."""
    for sentence in sentences[:_NUM_WARM_UP]:
        speak(llm, [sentence], [0])
    began, cpu_began = time.perf_counter(), time.process_time()
    takes = [take for sentence in sentences for take in speak(llm, [sentence], [0])]
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    seconds = sum(len(take.samples) / take.sample_rate for take in takes)
    return {"single: CPU s per s": cpu / seconds, "single: wall s per s": wall / seconds}


def word_error_rate(texts: Sequence[str], heard: Sequence[Sequence[str]]) -> float:
    """Errors per word of the texts."""
    wanted = [normal_words(text) for text in texts]
    errors = sum(map(count_word_errors, wanted, heard))
    return errors / sum(map(len, wanted))


def figures_of(takes: Sequence[Take]) -> dict[str, float]:
    """What needs no judge: end of speech, lengths, loops, silence."""
    ratios = [take.length_ratio for take in takes]
    return {
        "end of speech": mean(take.has_ended for take in takes),
        "length ratio": mean(ratios),
        "shortest": min(ratios),
        "longest": max(ratios),
        "loops": sum(take.loop_s > _LOOP_S for take in takes),
        "silence share": mean(silence_share(take.samples) for take in takes),
    }


def silence_share(samples: Samples) -> float:
    """Share of frames whose root mean square is below a hundredth of full scale."""
    frames = samples[: len(samples) // _FRAME * _FRAME].reshape(-1, _FRAME)
    return float((np.sqrt((frames**2).mean(axis=1)) < _SILENCE).mean())


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
    parser.add_argument(
        "--num-single", type=int, default=10, help="requests whose times are taken alone; 0: none"
    )
    parser.add_argument(
        "--num-processes", type=int, default=os.cpu_count(), help="judges that work side by side"
    )
    parser.add_argument("--dtype", default="auto", help="of the language model's weights")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument(
        "--noise", type=float, default=ROOM_NOISE, help="that pocketsphinx hears, of full scale"
    )
    parser.add_argument("--whisper", type=Path, help="folder of a CTranslate2 model")
    parser.add_argument("--opinion", action="store_true", help="ask judges of the sound too")
    parser.add_argument("--round-trip", action="store_true", help="judge the teacher's codes")
    parser.add_argument("--wavs", type=Path, help="folder to write the takes of the first seed to")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    figures, takes = judge(args)
    print(format_table(["figure", "value"], list(figures.items())))
    if args.json:
        write_json(args.json, {"figures": figures, "takes": takes})


def judge(args: argparse.Namespace) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures of a run by name, and what was found of each take."""
    sentences = read_sentences()[: args.num_sentences]
    references = round_trips(load_codec(args.model / "codec", device="cpu"), sentences)
    figures, takes = ({}, references) if args.round_trip else _takes_of(args, sentences)
    figures |= {"takes": len(takes), **figures_of(takes)}
    rows = [_row_of(take) for take in takes]
    clips = [(take.samples, take.sample_rate) for take in takes]
    texts = [take.sentence.text for take in takes]

    def hear(name: str, make_recogniser: Callable[[], Judge]) -> None:
        heard = ask(make_recogniser, clips, num_processes=args.num_processes)
        figures[f"WER, {name}"] = word_error_rate(texts, heard)
        for row, words in zip(rows, heard, strict=True):
            row[name] = " ".join(words)

    def rate(name: str, make_judge: Callable[[], Judge]) -> None:
        opinions = ask(make_judge, clips, num_processes=args.num_processes)
        figures[name] = mean(opinions)
        for row, opinion in zip(rows, opinions, strict=True):
            row[name] = opinion

    recogniser = partial(ClosedVocabularyRecogniser, grammar_sentences(), noise=args.noise)
    hear("closed vocabulary", recogniser)
    if args.whisper:
        hear("Whisper", partial(FreeRecogniser, args.whisper))
    if args.opinion:
        voice = np.concatenate([each.samples for each in references])
        rate("DNSMOS", Listeners)
        rate("likeness", partial(VoiceJudge, voice, references[0].sample_rate))
    if args.wavs:
        _write_wavs(args.wavs, takes[: len(sentences)])
    return figures, rows


def _takes_of(
    args: argparse.Namespace, sentences: Sequence[Sentence]
) -> tuple[dict[str, float], list[Take]]:
    """What the model says, and what that costs."""
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    began = time.perf_counter()
    llm = LLM(
        args.model / "lm",
        audio_tokenizer=args.model / "codec",
        voices_dir=args.model / "voices",
        device="cpu",
        dtype=args.dtype,
    )
    figures = {"size MB": _size_mb(args.model), "load s": time.perf_counter() - began}
    if args.num_single:
        figures |= cost_of_single_requests(llm, sentences[: args.num_single])
    cpu_began = time.process_time()
    takes = speak(llm, sentences, args.seeds, **sampling)
    cpu = time.process_time() - cpu_began
    figures["batch: CPU s per s"] = cpu / sum(
        len(take.samples) / take.sample_rate for take in takes
    )
    llm.shutdown()
    return figures, takes


def _size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def _row_of(take: Take) -> dict[str, Any]:
    return {
        "text": take.sentence.text,
        "seed": take.seed,
        "end of speech": take.has_ended,
        "length ratio": take.length_ratio,
        "loop s": take.loop_s,
    }


def _write_wavs(folder: Path, takes: Sequence[Take]) -> None:
    from vllm.audio import encode_all, lookup

    folder.mkdir(parents=True, exist_ok=True)
    for index, take in enumerate(takes):
        data = encode_all(take.samples, lookup("wav"), sample_rate=take.sample_rate)
        (folder / f"{index:02}.wav").write_bytes(data)


if __name__ == "__main__":
    main()
