"""What the scheduler tells the worker to do in one step: plain values, nothing else.

A step is either a prefill step (prompt positions of a few requests, no sampling) or a decode
step (one frame of every running request). A request is described once, when it gets its row;
afterwards only changes travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from vllm.player import Listener
from vllm.sampling_params import SamplingParams

__all__ = ["NewRequestData", "PrefillChunk", "SchedulerOutput", "StepKind"]


class StepKind(StrEnum):
    IDLE = "idle"  # nothing to compute; finished rows may still be freed
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, eq=False)
class NewRequestData:
    """Everything the worker must know of a request, sent before its first step."""

    request_id: str
    prompt_token_ids: NDArray[np.int32]  # [num_prompt_positions]
    prompt_frames: NDArray[np.int16]  # [num_audio_positions, num_codebooks], delayed
    audio_positions: NDArray[np.int64]  # [num_audio_positions], where these lie, rising
    sampling_params: SamplingParams
    seed: int
    frame_limit: int  # delayed frames after which the request ends
    max_silence_frames: int | None  # None: no silence guard
    num_cached_positions: int  # first positions whose keys and values other requests computed
    listener: Listener | None = None  # None: nobody plays the audio while it is made


@dataclass(frozen=True)
class PrefillChunk:
    """Prompt positions [start, start + length) of one request."""

    request_id: str
    start: int
    length: int
    is_last: bool  # the whole prompt is in the cache after this chunk


@dataclass(frozen=True)
class SchedulerOutput:
    """One step.

    ``new_blocks`` are appended to the request's block table before the step. ``swap_out`` copies
    the listed blocks (those of its table that hold written positions) and the row's state to the
    host and frees the row; ``swap_in`` takes a new row, restores its state and copies the pages
    into the listed blocks, as many as were swapped out, which are then its whole block table
    until ``new_blocks`` are appended.
    Order within a step: finished, swap_out, swap_in, new, new_blocks, compute.
    """

    step_kind: StepKind
    new: tuple[NewRequestData, ...] = ()
    new_blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # req_id -> block ids
    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[str, ...] = ()  # request ids, one frame each
    swap_out: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # req_id -> block ids
    swap_in: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # req_id -> block ids
    finished: frozenset[str] = frozenset()  # rows and codec state the worker must drop

    @property
    def num_positions(self) -> int:
        """Positions computed in this step."""
        return sum(chunk.length for chunk in self.prefill) + len(self.decode)
