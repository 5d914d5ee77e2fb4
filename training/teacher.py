"""The teacher: a small open text-to-speech model whose durations are read out beside its samples.

hibari-tts 0.2.1 (Apache-2.0), voice heart. Only making data and the lexicon needs it.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import NamedTuple

import hibari
import numpy as np
import onnx
import onnxruntime
from hibari import dsp
from numpy.typing import NDArray

from training.alphabet import from_teacher, split, to_teacher

__all__ = ["HOP", "SAMPLE_RATE", "Spoken", "Teacher"]

SAMPLE_RATE = 24000
HOP = 300  # samples of one of the teacher's frames
_DURATIONS = "/Clip_output_0"  # of the exported graph: frames of each input symbol
_VOICED_HZ = 40.0  # below it the teacher makes no pulses
_LEAD_FRAMES = 6  # silence kept before the first symbol, 75 ms
_SPECTRA = ["lh", "theta", "ln", "lr", "phi", "f0"]


class Spoken(NamedTuple):
    """One utterance."""

    samples: NDArray[np.float32]  # [sum(durations) * HOP]
    durations: NDArray[np.int64]  # frames of: silence, each symbol, silence
    f0: NDArray[np.float32]  # [sum(durations)] Hz, 0 where unvoiced


class Teacher:
    """Phonemes to samples; equal seeds give equal samples."""

    def __init__(self) -> None:
        self._hibari = hibari.Hibari(threads=1)
        model = onnx.load(self._hibari.model_path)
        model.graph.output.append(onnx.ValueInfoProto(name=_DURATIONS))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options)

    def pronounce(self, text: str) -> str | None:
        """Our phonemes of a text as the teacher reads it; None if our alphabet lacks one."""
        return from_teacher(" ".join(self._hibari.phonemize(text)))

    def rare_words(self) -> dict[str, str]:
        """Word -> phonemes of the teacher's own lexicon, lower-case words of 3 to 9 letters."""
        path = Path(hibari.__file__).parent / "assets" / "lexicon_us_gold.json.gz"
        entries = json.loads(gzip.decompress(path.read_bytes()))
        words = {}
        for word, phonemes in sorted(entries.items()):
            if isinstance(phonemes, str) and 3 <= len(word) <= 9 and word.isalpha():
                ours = from_teacher(phonemes)
                if ours is not None and word.islower() and word.isascii():
                    words[word] = ours
        return words

    def speak(self, phonemes: str, *, speed: float, seed: int) -> Spoken:
        """Say a phoneme string in our alphabet."""
        symbols = split(phonemes)
        ids = self._hibari.ids(to_teacher(phonemes))
        inputs = {"ids": np.array([ids], np.int64), "speed": np.array([speed], np.float32)}
        *spectra, frames = self._session.run([*_SPECTRA, _DURATIONS], inputs)
        *filters, f0 = (each[0] for each in spectra)
        samples = dsp.synth(*filters, f0, np.random.default_rng(seed))
        lead, *inner, tail = frames.ravel().astype(np.int64)
        per_letter = iter(inner)
        merged = [sum(next(per_letter) for _ in symbol) for symbol in symbols]
        cut = max(0, lead - _LEAD_FRAMES)
        return Spoken(
            samples=samples[cut * HOP :],
            durations=np.array([lead - cut, *merged, tail]),
            f0=np.where(f0 > _VOICED_HZ, f0, 0)[cut:].astype(np.float32),
        )
