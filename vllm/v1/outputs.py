"""What the worker hands back to the scheduler after one step: plain values, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["AudioChunk", "CodecStats", "EncodedClip", "ModelRunnerOutput"]


@dataclass(frozen=True, eq=False)
class AudioChunk:
    """Decoded audio of one request, in order.

    ``final`` says that nothing follows. ``cut_frame`` is set when the silence guard cut the
    audio: the number of real frames kept in all. ``error`` ends the request.
    """

    request_id: str
    samples: NDArray[np.float32]  # [num_frames * hop_length]
    num_frames: int
    final: bool = False
    cut_frame: int | None = None
    error: str | None = None


@dataclass(frozen=True, eq=False)
class EncodedClip:
    """Codes of a reference clip, or why there are none."""

    key: str
    codes: NDArray[np.int16] | None  # [num_codebooks, num_frames]
    error: str | None = None


@dataclass(frozen=True)
class CodecStats:
    """What the codec has done, and what waits for it."""

    num_waiting: int = 0  # windows that could be decoded now
    num_windows: int = 0  # decoded
    decode_time_s: float = 0.0  # in which one window or more were being decoded
    num_clips: int = 0  # encoded, or tried to
    num_known_clips: int = 0  # found in the cache instead
    encode_time_s: float = 0.0


@dataclass(frozen=True, eq=False)
class ModelRunnerOutput:
    """Result of one step.

    Frames are those of the step itself or, from a worker that works ahead, of one before it.
    Requests that ended or were dropped meanwhile are not among their rows.
    """

    request_ids: tuple[str, ...] = ()
    frames: NDArray[np.int16] | None = None  # [num_reqs, num_codebooks], delayed
    finish: NDArray[np.uint8] | None = None  # [num_reqs]: 0 running, 1 ended by EOS, 2 limit
    errors: dict[str, str] = field(default_factory=dict)  # req_id -> what went wrong
    chunks: tuple[AudioChunk, ...] = ()
    clips: tuple[EncodedClip, ...] = ()
