"""Judges of speech: what a recogniser hears, how it sounds to a model of listeners, and whose voice.

All carry their models in their packages. Pocketsphinx is in the extra ``test``, the others are in
the extra ``quality`` and imported when they are first asked.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm.audio.resample import resample

__all__ = [
    "ROOM_NOISE",
    "ClosedVocabularyRecogniser",
    "FreeRecogniser",
    "Listeners",
    "VoiceJudge",
    "ask",
    "count_word_errors",
    "longest_loop_s",
    "normal_words",
]

# Root mean square of full scale: a quiet room. How much the judge depends on it is in
# docs/embedded-model.md.
ROOM_NOISE = 1e-3
_RATE = 16000  # of every judge
_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = [
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_DISCOUNT = 0.5  # of bigram counts

Samples = NDArray[np.float32]
Judge = Callable[[Samples, int], Any]  # of samples and their rate

_SEAT: list[Judge] = []  # of this process


def ask(
    make_judge: Callable[[], Judge], clips: Sequence[tuple[Samples, int]], *, num_processes: int = 1
) -> list[Any]:
    """What a judge says of each clip; with several processes each one has a judge of its own.

    Args:
        make_judge: called once in each process, so it must be picklable for several.
        clips: samples and their rate.
    """
    num_processes = min(num_processes, len(clips))
    if num_processes <= 1:
        judge = make_judge()
        return [judge(samples, rate) for samples, rate in clips]
    with ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),  # a fork would copy held locks
        initializer=_take_seat,
        initargs=(make_judge,),
    ) as processes:
        return list(processes.map(_say, clips, chunksize=2))


def _take_seat(make_judge: Callable[[], Judge]) -> None:
    _SEAT.append(make_judge())


def _say(clip: tuple[Samples, int]) -> Any:
    return _SEAT[0](*clip)


def normal_words(text: str) -> list[str]:
    """Lower-case words without marks; numbers up to 99 as words, as they are spoken."""
    words: list[str] = []
    for word in re.findall(r"[a-z']+|\d+", text.lower()):
        words += _number_words(int(word)) if word.isdigit() else [word]
    return words


def _number_words(number: int) -> list[str]:
    if number < 10:
        return [_ONES[number]]
    if number < 20:
        return [_TEENS[number - 10]]
    if number < 100:
        tens = _TENS[number // 10 - 2]
        return [tens, _ONES[number % 10]] if number % 10 else [tens]
    return [_ONES[int(digit)] for digit in str(number)]


def count_word_errors(reference: Sequence[str], heard: Sequence[str]) -> int:
    """Least number of substituted, lost and added words."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, start=1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
            diagonal, row[j] = row[j], best
    return row[-1]


def longest_loop_s(codes: NDArray[np.integer], *, frame_rate: float) -> float:
    """Longest stretch in which the first codebook repeats a pattern of up to ten codes, in s."""
    first = np.asarray(codes)[0]
    longest = 0
    for period in range(1, 11):
        same = first[period:] == first[:-period]
        run = 0
        for is_same in same:
            run = run + 1 if is_same else 0
            if run >= period:  # at least one whole repetition
                longest = max(longest, run + period)
    return longest / frame_rate


class ClosedVocabularyRecogniser:
    """Pocketsphinx with a bigram model of sentences like those that are to be judged.

    It knows no other words, so its errors are small for clear speech of the vocabulary, and above
    100 % for speech that says something else.
    """

    def __init__(self, sentences: Sequence[str], *, noise: float = ROOM_NOISE) -> None:
        """Prepare to hear.

        Args:
            sentences: many of the same kind and vocabulary, not those that are judged.
            noise: that is added to what is heard, root mean square of full scale.
        """
        self._noise = noise
        from pocketsphinx import Decoder, get_model_path

        model = Path(get_model_path()) / "en-us"
        dictionary = model / "cmudict-en-us.dict"
        known = {line.split(" ", 1)[0] for line in dictionary.read_text("utf-8").splitlines()}
        with tempfile.NamedTemporaryFile("w", suffix=".arpa", encoding="utf-8") as file:
            file.write(_bigram_model([normal_words(each) for each in sentences], known))
            file.flush()
            self._decoder = Decoder(
                hmm=str(model / "en-us"), dict=str(dictionary), lm=file.name, loglevel="FATAL"
            )

    def __call__(self, samples: Samples, sample_rate: int) -> list[str]:
        """What was said, word by word."""
        loud = _at_rate(samples, sample_rate)
        loud = 0.7 * loud / max(float(np.abs(loud).max(initial=0.0)), 1e-6)
        silence = np.zeros(_RATE // 5, np.float32)
        padded = np.concatenate([silence, loud, silence])
        # Digital silence confuses the recogniser's noise estimate.
        padded = padded + self._noise * np.random.default_rng(0).standard_normal(len(padded))
        self._decoder.start_utt()
        pcm = (padded * 32767).clip(-32768, 32767).astype("<i2").tobytes()
        self._decoder.process_raw(pcm, no_search=False, full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return normal_words(re.sub(r"\(\d\)", "", hypothesis.hypstr)) if hypothesis else []


def _bigram_model(sentences: Sequence[Sequence[str]], known: set[str]) -> str:
    """An ARPA file with absolute discounting, of the words that the dictionary has."""
    padded = [["<s>", *(w for w in words if w in known), "</s>"] for words in sentences]
    singles = Counter(word for words in padded for word in words)
    pairs = Counter(pair for words in padded for pair in itertools.pairwise(words))
    contexts: Counter[str] = Counter()
    followers: Counter[str] = Counter()
    for (first, _), count in pairs.items():
        contexts[first] += count
        followers[first] += 1
    total = sum(count for word, count in singles.items() if word != "<s>")
    lines = ["\\data\\", f"ngram 1={len(singles)}", f"ngram 2={len(pairs)}", "", "\\1-grams:"]
    for word, count in sorted(singles.items()):
        probability = -99.0 if word == "<s>" else math.log10(count / total)
        left = _DISCOUNT * followers[word] / contexts[word] if word in contexts else 1.0
        lines.append(f"{probability:.4f}\t{word}\t{math.log10(left):.4f}")
    lines += ["", "\\2-grams:"]
    for (first, second), count in sorted(pairs.items()):
        probability = math.log10((count - _DISCOUNT) / contexts[first])
        lines.append(f"{probability:.4f}\t{first} {second}")
    return "\n".join([*lines, "", "\\end\\", ""])


class FreeRecogniser:
    """Whisper, which may hear any word; from a folder with a CTranslate2 model."""

    def __init__(self, folder: Path) -> None:
        from faster_whisper import WhisperModel

        self._model = WhisperModel(
            str(folder), device="cpu", compute_type="int8", cpu_threads=1, local_files_only=True
        )

    def __call__(self, samples: Samples, sample_rate: int) -> list[str]:
        """What was said, word by word."""
        segments, _ = self._model.transcribe(
            _at_rate(samples, sample_rate),
            language="en",
            beam_size=1,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        return normal_words(" ".join(segment.text for segment in segments))


class Listeners:
    """DNSMOS, a model of listeners' overall opinion, 1 to 5."""

    def __init__(self) -> None:
        from speechmos import dnsmos

        self._judge = dnsmos

    def __call__(self, samples: Samples, sample_rate: int) -> float:
        narrow = _at_rate(samples, sample_rate)
        narrow = 0.9 * narrow / max(float(np.abs(narrow).max(initial=0.0)), 1e-6)
        return float(self._judge.run(narrow, sr=_RATE)["ovrl_mos"])


class VoiceJudge:
    """Resemblyzer: cosine of voices; above 0.85 is the same voice, below 0.77 another."""

    def __init__(self, voice: Samples, sample_rate: int) -> None:
        """``voice``: a clip of the voice that others are compared with."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it asks scipy for an old name
            from resemblyzer import VoiceEncoder

        self._encoder = VoiceEncoder("cpu", verbose=False)
        self._voice = self._embed(voice, sample_rate)

    def __call__(self, samples: Samples, sample_rate: int) -> float:
        return float(self._embed(samples, sample_rate) @ self._voice)

    def _embed(self, samples: Samples, sample_rate: int) -> NDArray[np.float32]:
        embedding: NDArray[np.float32] = self._encoder.embed_utterance(
            _levelled(_at_rate(samples, sample_rate))
        )
        return embedding


def _levelled(samples: Samples) -> Samples:
    """At -30 dB, which is what the voice encoder was trained on."""
    power = float(np.sqrt(np.mean(samples**2)))
    return samples * np.float32(10 ** (-30 / 20) / max(power, 1e-9))


def _at_rate(samples: Samples, sample_rate: int) -> Samples:
    return resample(samples, sample_rate, _RATE)
