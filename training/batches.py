"""Batches for the language model: prompts, delayed frames, targets and where each frame is read.

The damage that is done to the audio context here is what makes the model read: where its own past
is wrong or missing, only the text tells what comes next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

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


class _Utterance(NamedTuple):
    """A row of a batch before it is padded."""

    ids: NDArray[np.int64]  # [n], with what the clip says
    clip: NDArray[np.int64]  # [c, 8], delayed frames of the clip of the voice; c may be 0
    clip_at: int  # ids before the clip
    frames: NDArray[np.int64]  # [t + 1, 8], delayed, of which the last is a target only
    reading: NDArray[np.float32]  # [t, aligned ids]


class _Size(NamedTuple):
    """What the rows of a batch are padded to."""

    num_text: int
    num_clip: int  # of the audio, frames of clips
    num_audio: int


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
        utterances = [
            self._utterance(index, reference, shuffled=shuffled)
            for index, reference in zip_longest(indices, references)
        ]
        num_clip = max(len(each.clip) for each in utterances)
        size = _Size(
            num_text=_rounded(max(len(each.ids) for each in utterances)),
            num_clip=num_clip,
            num_audio=_rounded(num_clip + max(len(each.frames) for each in utterances) - 1),
        )
        donors = [each.frames for each in utterances] if damaged else []
        rows = [self._row(each, size, donors) for each in utterances]
        return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))

    def _utterance(self, index: int, reference: int | None, *, shuffled: bool) -> _Utterance:
        corpus = self._corpus
        head, clip = np.array(PREFIX), np.zeros((0, 8), np.int64)
        if reference is not None:
            head = np.concatenate([PREFIX, self._symbol_ids(reference), SUFFIX, BETWEEN])
            clip = delay(corpus.codes_of(reference))
        symbols = self._symbol_ids(index)
        if shuffled:
            symbols = self._rng.permutation(symbols)
        codes = corpus.codes_of(index)
        num_learnt = len(codes) + _TAIL_FRAMES + 1
        return _Utterance(
            ids=np.concatenate([head, symbols, SUFFIX]),
            clip=clip,
            clip_at=len(head) - len(BETWEEN),
            frames=delay(codes)[: num_learnt + 1],
            reading=alignment(corpus.durations_of(index), num_learnt),
        )

    def _symbol_ids(self, index: int) -> NDArray[np.int64]:
        return self._corpus.symbols_of(index).astype(np.int64) + FIRST_SYMBOL_ID

    def _row(
        self, utterance: _Utterance, size: _Size, donors: Sequence[NDArray[np.int64]]
    ) -> tuple[NDArray[Any], ...]:
        """One row of each tensor of a batch; with ``donors`` its frames are damaged."""
        ids, clip, _, full, read = utterance
        num_padding = size.num_text - len(ids)
        spoken = slice(size.num_clip, size.num_clip + len(full) - 1)
        frames = np.full((size.num_audio, 8), EOS, np.int64)
        frames[: len(clip)] = clip
        frames[spoken] = self._damaged(full[:-1], donors) if donors else full[:-1]
        targets = np.full(frames.shape, IGNORED, np.int64)
        targets[spoken] = _targets(full)
        # The reading ends with the silence id, which is the first of the suffix.
        first = size.num_text - len(SUFFIX) - read.shape[1] + 1
        reading = np.zeros((size.num_audio, size.num_text), np.float32)
        reading[spoken, first : first + read.shape[1]] = read
        text = np.pad(ids, (num_padding, 0))
        return text, np.array(num_padding), frames, targets, reading, _positions(utterance, size)

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


def _positions(utterance: _Utterance, size: _Size) -> NDArray[np.int64]:
    """Places in the prompt, [num_text + num_audio]."""
    num_ids, clip_length = len(utterance.ids), len(utterance.clip)
    ids, spoken = np.arange(num_ids), np.arange(size.num_audio - size.num_clip)
    ids[utterance.clip_at :] += clip_length
    clip = np.arange(size.num_clip)
    return np.concatenate(
        [
            np.full(size.num_text - num_ids, -1),
            ids,
            np.where(clip < clip_length, utterance.clip_at + clip, -1),
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
