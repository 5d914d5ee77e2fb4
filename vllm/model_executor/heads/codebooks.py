"""State of K codebook streams under the delay pattern: what may come next, what came, the end.

Everything is a tensor with one row per request, so that a step has no loop over requests or
codebooks, and on a device no copy to or from the host, which a CUDA graph could not hold. How
codes are drawn from logits is the sampler's business.

With ``s`` the frame in which EOS appeared, codebook k of frame f is BOS while f <= k and EOS
from f - s >= k + lag on. Two rules differ in three points:

==================  ======================================  ================================
                    strict                                  reference (transformers)
==================  ======================================  ================================
EOS may appear in   codebook 0, from frame 2 on             any codebook past its ramp
BOS may appear      in the ramp only                        anywhere
lag                 0: the staircase is the delay pattern   1: each codebook may end itself
==================  ======================================  ================================

An utterance ends with the first all-EOS frame under both.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from vllm.kernels.sampler import StreamMemory
from vllm.model_executor.framing import DelayPattern
from vllm.platforms import copy_to_device
from vllm.sampling_params import MAX_RAS_WINDOW, EosRule

__all__ = ["CodebookState", "FrameStatus", "NextFrame", "RowSnapshot"]

_NEVER = 2**40  # a frame index that no utterance reaches
_FREE = -1  # no code is dictated

# Columns of the counters. One tensor, so that a step gathers and scatters once.
_NUM_FRAMES = 0  # delayed frames so far, BOS frame included
_EOS_TURN = 1  # frame from which codebook 0 is forced to EOS; codebook k follows k later
_EOS_LAG = 2  # frames between the first EOS and that
_FRAME_LIMIT = 3  # delayed frames at which the row is cut
_EOS_ALLOWED = 4  # frame from which codebook 0 may emit EOS
_ANY_ALLOWED = 5  # 1: BOS anywhere and EOS in any codebook
_NUM_COUNTERS = 6

_STARTS: dict[EosRule, tuple[int, ...]] = {
    "strict": (0, _NEVER, 0, _NEVER, 2, 0),  # from frame 2 on: at least one frame of sound
    "reference": (0, _NEVER, 1, _NEVER, 0, 1),
}


class FrameStatus(IntEnum):
    """What a frame meant for its row."""

    RUNNING = 0
    STOPPED = 1  # it is the all-EOS frame
    LIMIT = 2  # the row's frame limit is reached without it


@dataclass(frozen=True)
class NextFrame:
    """What each row's next frame may hold."""

    index: Tensor  # [num_rows] int64, 0 for the BOS frame
    forced: Tensor  # [num_rows, num_codebooks] int64, the code that is dictated, -1 where free
    allow_bos: Tensor  # [num_rows, 1] bool, for free codebooks
    allow_eos: Tensor  # [num_rows, num_codebooks] bool, for free codebooks


@dataclass(frozen=True)
class RowSnapshot:
    """State of one row, to go on elsewhere as if nothing had happened."""

    counters: Tensor  # [6] int64
    last_frame: Tensor  # [num_codebooks] int64
    history: Tensor  # [MAX_RAS_WINDOW, num_codebooks] int16


class CodebookState:
    """Persistent rows of codebook streams.

    A step is ``next_frame`` → sample → ``advance``. Rows are given as an int64 tensor on the
    state's device, without duplicates.
    """

    def __init__(
        self, pattern: DelayPattern, max_num_rows: int, device: torch.device | str = "cpu"
    ) -> None:
        num_codebooks = pattern.num_codebooks
        self.pattern = pattern
        self.last_frame = torch.zeros(
            max_num_rows, num_codebooks, dtype=torch.int64, device=device
        )  # [max_num_rows, num_codebooks], input of the next forward pass
        self._counters = torch.zeros(
            max_num_rows, _NUM_COUNTERS, dtype=torch.int64, device=device
        )  # [max_num_rows, 6], see the column names above
        self._history = torch.full(
            (max_num_rows, MAX_RAS_WINDOW, num_codebooks), -1, dtype=torch.int16, device=device
        )  # [max_num_rows, MAX_RAS_WINDOW, num_codebooks], ring; -1 where BOS, EOS or nothing
        self._codebook = torch.arange(num_codebooks, device=device)
        self._age = torch.arange(MAX_RAS_WINDOW, device=device)

    @property
    def num_frames(self) -> Tensor:
        """Delayed frames of every row so far, int64 [max_num_rows]."""
        return self._counters[:, _NUM_FRAMES]

    @property
    def memory(self) -> StreamMemory:
        """The rows' state itself, for native code that takes steps on it."""
        return StreamMemory(
            last_frame=self.last_frame,
            counters=self._counters,
            history=self._history,
            bos=self.pattern.bos,
            eos=self.pattern.eos,
        )

    def add_row(
        self, row: int, *, eos_rule: EosRule = "strict", frame_limit: int | None = None
    ) -> None:
        """Start an utterance whose next frame is the BOS frame.

        Args:
            row: where.
            eos_rule: see ``SamplingParams``.
            frame_limit: delayed frames, BOS frame included, at which the row is cut.
        """
        start = np.array(_STARTS[eos_rule], np.int64)
        if frame_limit is not None:
            start[_FRAME_LIMIT] = frame_limit
        # NOTE: a number that is assigned to one element of a device's tensor waits for the device.
        self._counters[row] = copy_to_device(start, self._counters.device)
        self._history[row] = -1

    def save_row(self, row: int) -> RowSnapshot:
        """Copy of a row's state; the row may then be given away."""
        return RowSnapshot(
            counters=self._counters[row].clone(),
            last_frame=self.last_frame[row].clone(),
            history=self._history[row].clone(),
        )

    def restore_row(self, row: int, snapshot: RowSnapshot) -> None:
        """Go on in ``row`` where ``snapshot`` was taken."""
        self._counters[row] = snapshot.counters
        self.last_frame[row] = snapshot.last_frame
        self._history[row] = snapshot.history

    def start(self, rows: Tensor) -> Tensor:
        """Append the BOS frame, for which no logits are needed; returns as ``advance``."""
        bos = torch.full((len(rows), len(self._codebook)), self.pattern.bos, device=rows.device)
        return self.advance(rows, bos)

    def next_frame(self, rows: Tensor) -> NextFrame:
        """What the next frame of ``rows`` [num_rows] may hold."""
        counters = self._counters[rows]
        index, eos_turn = counters[:, _NUM_FRAMES], counters[:, _EOS_TURN]
        in_ramp_down = (index - eos_turn)[:, None] >= self._codebook
        forced = torch.full(in_ramp_down.shape, _FREE, device=rows.device)
        forced.masked_fill_(in_ramp_down, self.pattern.eos)
        forced.masked_fill_(index[:, None] <= self._codebook, self.pattern.bos)
        allow_bos = counters[:, _ANY_ALLOWED:] > 0
        allow_eos = (index >= counters[:, _EOS_ALLOWED])[:, None] & (self._codebook == 0)
        return NextFrame(index, forced, allow_bos, allow_eos | allow_bos)

    def recent(self, rows: Tensor, width: int) -> Tensor:
        """Codes of the last ``width`` frames, int16 [num_rows, width, num_codebooks].

        Newest first; -1 where a frame held BOS or EOS, or was never made.
        """
        newest = self._counters[rows, _NUM_FRAMES] - 1
        slots = (newest[:, None] - self._age[:width]) % MAX_RAS_WINDOW
        return self._history[rows[:, None], slots]

    def advance(self, rows: Tensor, frames: Tensor) -> Tensor:
        """Append one frame to each row.

        Args:
            rows: int64 [num_rows].
            frames: int64 [num_rows, num_codebooks], what ``next_frame`` dictates included.

        Returns:
            ``FrameStatus`` of each row, uint8 [num_rows].
        """
        counters = self._counters[rows]
        index = counters[:, _NUM_FRAMES]
        is_eos = frames == self.pattern.eos
        has_ended = is_eos.all(-1)
        self._remember(rows, index, frames, is_eos)

        turn = (index + counters[:, _EOS_LAG]).masked_fill_(~is_eos.any(-1), _NEVER)
        counters[:, _EOS_TURN].clamp_(max=turn)
        index += 1  # a view: the counter itself
        self._counters[rows] = counters
        is_full = index >= counters[:, _FRAME_LIMIT]
        status = (is_full * FrameStatus.LIMIT).masked_fill_(has_ended, FrameStatus.STOPPED)
        return status.to(torch.uint8)

    def _remember(self, rows: Tensor, index: Tensor, frames: Tensor, is_eos: Tensor) -> None:
        self.last_frame[rows] = frames
        is_marker = is_eos | (frames == self.pattern.bos)
        counted = frames.masked_fill(is_marker, -1).to(torch.int16)
        self._history[rows, index % MAX_RAS_WINDOW] = counted
