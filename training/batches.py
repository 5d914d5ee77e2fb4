"""Batches for the language model: prompts, delayed frames, targets and where each frame is read.

The damage that is done to the audio context here is what makes the model read: where its own past
is wrong or missing, only the text tells what comes next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.corpus import Corpus
from training.prompt import BETWEEN, FIRST_SYMBOL_ID, PREFIX, SUFFIX

__all__ = ["BOS", "EOS", "Batch", "Batches", "alignment"]

BOS, EOS = 1024, 1025
IGNORED = -100
_FRAMES_PER_CODEC_FRAME = 960 / 300  # of the teacher
_TAIL_FRAMES = 2  # past the end, in which only the delayed codebooks still speak, that are learnt
_LENGTH_STEP = 8


class Batch(NamedTuple):
    """B utterances; Tt ids of text, right-aligned, then Ta delayed frames.

    Where they have references, the frames begin with those, as long as the longest.
    """

    text: Tensor  # int64 [B, Tt]
    num_padding: Tensor  # int64 [B]
    frames: Tensor  # int64 [B, Ta, 8], inputs
    targets: Tensor  # int64 [B, Ta, 8], IGNORED where nothing is learnt
    reading: Tensor  # float32 [B, Ta, Tt], rows of sum 1: share of each id in the frame to come
    positions: Tensor  # int64 [B, Tt + Ta], -1 for padding before the text and after a reference

    def to(self, device: torch.device) -> Batch:
        return Batch(*(each.to(device) for each in self))


def alignment(durations: NDArray[np.uint8], num_frames: int) -> NDArray[np.float32]:
    """Share of each aligned id (silence, symbols, silence) in each codec frame, rows of sum 1."""
    ends = np.cumsum(durations.astype(np.float64))
    ends[-1] = max(ends[-1], (num_frames + 1) * _FRAMES_PER_CODEC_FRAME)  # silence goes on
    begins = np.concatenate([[0.0], ends[:-1]])
    first = np.arange(num_frames)[:, None] * _FRAMES_PER_CODEC_FRAME
    overlap = np.minimum(ends, first + _FRAMES_PER_CODEC_FRAME) - np.maximum(begins, first)
    return (overlap.clip(min=0) / _FRAMES_PER_CODEC_FRAME).astype(np.float32)


def delay(codes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Codes [T, 8] -> delayed frames [T + 9, 8], BOS frame first."""
    num_frames, num_codebooks = codes.shape
    delayed = np.full((num_frames + num_codebooks + 1, num_codebooks), BOS, np.int64)
    for k in range(num_codebooks):
        delayed[k + 1 : k + 1 + num_frames, k] = codes[:, k]
        delayed[k + 1 + num_frames :, k] = EOS
    return delayed


class Batches:
    """Draws batches of similar length; equal seeds give equal batches."""

    def __init__(
        self, corpus: Corpus, *, seed: int, damage: float, reference_share: float = 0.0
    ) -> None:
        """``damage``: share of the frames of the context that are replaced.

        ``reference_share``: share of training batches whose prompts have a clip of the voice.
        """
        self._corpus = corpus
        self._rng = np.random.default_rng(seed)
        self._damage = damage
        self._reference_share = reference_share

    def training(self, size: int) -> Iterator[Batch]:
        """Endless batches of ``size`` utterances."""
        corpus = self._corpus
        indices = np.arange(corpus.num_validation, len(corpus))
        lengths = np.diff(corpus.frame_offsets)[indices]
        while True:
            jittered = lengths + self._rng.uniform(-6, 6, len(lengths))
            order = indices[np.argsort(jittered)]
            cut = len(order) // size * size
            groups = order[:cut].reshape(-1, size)
            for group in self._rng.permutation(groups):
                has_references = self._rng.random() < self._reference_share
                # Those of a batch are about equally long, as little padding as that makes.
                others = groups[int(self._rng.integers(len(groups)))] if has_references else ()
                yield self.make(group, references=others, damaged=True)

    def make(
        self,
        indices: Sequence[int] | NDArray[np.integer],
        *,
        damaged: bool,
        shuffled: bool = False,
        references: Sequence[int] | NDArray[np.integer] = (),
    ) -> Batch:
        """One batch; ``shuffled`` puts each text's symbols into random order.

        ``references`` are the utterances that the prompts have as clips of the voice, one for each
        or none.
        """
        corpus = self._corpus
        texts, delayed, readings = [], [], []
        heads = [np.array(PREFIX) for _ in indices]
        clips: list[NDArray[np.int64]] = [np.zeros((0, 8), np.int64) for _ in indices]
        for row, index in enumerate(references):
            said = corpus.symbols_of(index).astype(np.int64) + FIRST_SYMBOL_ID
            heads[row] = np.concatenate([PREFIX, said, SUFFIX, BETWEEN])
            clips[row] = delay(corpus.codes_of(index))
        for head, index in zip(heads, indices, strict=True):
            symbols = corpus.symbols_of(index).astype(np.int64) + FIRST_SYMBOL_ID
            if shuffled:
                symbols = self._rng.permutation(symbols)
            texts.append(np.concatenate([head, symbols, SUFFIX]))
            codes = corpus.codes_of(index)
            delayed.append(delay(codes)[: len(codes) + 1 + _TAIL_FRAMES + 1])
            readings.append(alignment(corpus.durations_of(index), len(codes) + _TAIL_FRAMES + 1))
        num_text = _rounded(max(map(len, texts)))
        num_clip = max(map(len, clips))
        num_audio = _rounded(num_clip + max(map(len, delayed)) - 1)
        shape = (len(texts), num_audio, 8)
        text = np.zeros((len(texts), num_text), np.int64)
        frames = np.full(shape, EOS, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        reading = np.zeros((len(texts), num_audio, num_text), np.float32)
        for row, (ids, full, read) in enumerate(zip(texts, delayed, readings, strict=True)):
            spoken = slice(num_clip, num_clip + len(full) - 1)
            text[row, num_text - len(ids) :] = ids
            frames[row, : len(clips[row])] = clips[row]
            frames[row, spoken] = self._damaged(full[:-1], delayed) if damaged else full[:-1]
            targets[row, spoken] = _targets(full)
            # The reading ends with the silence id, which is the first of the suffix.
            first = num_text - len(SUFFIX) - read.shape[1] + 1
            reading[row, spoken, first : first + read.shape[1]] = read[: len(full) - 1]
        padding = np.array([num_text - len(ids) for ids in texts])
        places = [
            _positions(len(head) - len(BETWEEN), len(ids), len(clip), num_text, num_clip, num_audio)
            for head, ids, clip in zip(heads, texts, clips, strict=True)
        ]
        arrays = (text, padding, frames, targets, reading, np.stack(places))
        return Batch(*(torch.from_numpy(each) for each in arrays))

    def _damaged(
        self, frames: NDArray[np.int64], donors: Sequence[NDArray[np.int64]]
    ) -> NDArray[np.int64]:
        """Frames with spans replaced: by another utterance's, or by random codes."""
        frames = frames.copy()
        wanted = self._rng.uniform(0, 2 * self._damage) * len(frames)
        while wanted > 0:
            span = int(self._rng.integers(1, 7))
            begin = int(self._rng.integers(1, len(frames)))
            end = min(begin + span, len(frames))
            if self._rng.random() < 0.5:
                donor = donors[int(self._rng.integers(len(donors)))]
                there = int(self._rng.integers(1, max(2, len(donor) - span)))
                taken = donor[there : there + end - begin]
                frames[begin : begin + len(taken)] = taken
            else:
                drawn = self._rng.integers(0, BOS, (end - begin, frames.shape[1]))
                frames[begin:end] = drawn
            wanted -= span
        return frames


def _positions(
    clip_at: int, num_ids: int, clip_length: int, num_text: int, num_clip: int, num_audio: int
) -> NDArray[np.int64]:
    """Places in the prompt, [num_text + num_audio], of which a clip's begin at ``clip_at``."""
    ids, spoken = np.arange(num_ids), np.arange(num_audio - num_clip)
    ids[clip_at:] += clip_length
    clip = np.arange(num_clip)
    return np.concatenate(
        [
            np.full(num_text - num_ids, -1),
            ids,
            np.where(clip < clip_length, clip_at + clip, -1),
            num_ids + clip_length + spoken,
        ]
    )


def _rounded(length: int) -> int:
    """The next multiple: a processor prepares a matrix product anew for each new shape."""
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def _targets(delayed: NDArray[np.int64]) -> NDArray[np.int64]:
    """What each input frame predicts; the ramps, which the engine dictates, are not learnt."""
    targets = delayed[1:].copy()
    targets[targets == BOS] = IGNORED
    is_end = targets == EOS
    first = is_end[:, 0].argmax()
    targets[is_end] = IGNORED
    targets[first, 0] = EOS
    return targets
