"""The one file that training reads: codes, symbols and alignment of everything, and some samples.

Safetensors, so that a machine with torch, numpy and safetensors can train from it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from training.features import FRAME

__all__ = ["Corpus", "compress", "expand", "said_sentences", "shard_path"]

_MU = 255.0


def shard_path(folder: Path, index: int) -> Path:
    """Where part ``index`` of the teacher's speech lies."""
    return folder / f"shard-{index:03}.npz"


def said_sentences(path: Path) -> frozenset[str]:
    """Sentences of a shard, without its lists and single words."""
    with np.load(path) as raw:
        said = json.loads(str(raw["texts"]))
    kinds = zip(said["texts"], said["kinds"], strict=True)
    return frozenset(text for text, kind in kinds if kind == "sentence")


@dataclass(frozen=True)
class Corpus:
    """Utterances one after the other; offsets have one entry more than there are utterances."""

    codes: NDArray[np.int16]  # [num_frames, 8]
    frame_offsets: NDArray[np.int64]
    symbols: NDArray[np.uint8]  # ids of alphabet.SYMBOLS
    symbol_offsets: NDArray[np.int64]
    durations: NDArray[np.uint8]  # teacher frames: silence, each symbol, silence
    samples: NDArray[np.uint8]  # mu-law, of the first `num_heard` utterances
    num_heard: int
    num_validation: int  # the first utterances are never trained on
    texts: list[str]  # of the validation utterances

    def __len__(self) -> int:
        return len(self.frame_offsets) - 1

    def codes_of(self, index: int) -> NDArray[np.int16]:
        return self.codes[self.frame_offsets[index] : self.frame_offsets[index + 1]]

    def symbols_of(self, index: int) -> NDArray[np.uint8]:
        return self.symbols[self.symbol_offsets[index] : self.symbol_offsets[index + 1]]

    def durations_of(self, index: int) -> NDArray[np.uint8]:
        begin, end = self.symbol_offsets[index : index + 2] + 2 * np.arange(index, index + 2)
        return self.durations[begin:end]

    def samples_of(self, index: int) -> NDArray[np.float32]:
        """Samples [frames * 960] of one of the first ``num_heard`` utterances."""
        begin, end = self.frame_offsets[index : index + 2] * FRAME
        return expand(self.samples[begin:end])

    def save(self, path: Path) -> None:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        notes = {name: json.dumps(getattr(self, name)) for name in _NOTES}
        save_file(tensors, path, metadata=notes)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
            notes = {name: json.loads(text) for name, text in file.metadata().items()}
        return cls(**tensors, **notes)


_TENSORS = ("codes", "frame_offsets", "symbols", "symbol_offsets", "durations", "samples")
_NOTES = ("num_heard", "num_validation", "texts")


def compress(samples: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Samples in [-1, 1] to eight bits each, by the mu-law."""
    curve = np.sign(samples) * np.log1p(_MU * np.abs(samples)) / np.log1p(_MU)
    return np.round((curve + 1) * 127.5).astype(np.uint8)


def expand(compressed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Inverse of ``compress``, up to rounding."""
    curve = compressed.astype(np.float32) / 127.5 - 1
    return (np.sign(curve) * np.expm1(np.abs(curve) * np.log1p(_MU)) / _MU).astype(np.float32)
