"""What callers of the engine receive: audio, codes, usage and timings of one request.

Plain values with numpy arrays; knows neither how they were made nor how they are sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

__all__ = ["FinishReason", "SpeechOutput", "SpeechStats", "Usage"]


class FinishReason(StrEnum):
    """Why a request ended. Every request ends with exactly one of these."""

    STOP = "stop"  # the model said so
    LENGTH = "length"  # max_tokens or the context is used up
    MAX_AUDIO = "max_audio"  # --max-audio-seconds
    SILENCE = "silence"  # --max-silence-seconds
    TEXT_LENGTH = "text_length"  # far more audio than the text can need
    ABORT = "abort"  # the caller gave up
    DEADLINE = "deadline"  # the request's own time limit passed
    ERROR = "error"  # the engine failed this request


@dataclass(frozen=True)
class Usage:
    """What one request cost, in positions of the context."""

    prompt_tokens: int = 0  # every prompt position: text ids and clip frames
    completion_tokens: int = 0  # delayed frames, BOS frame and ramp included
    audio_tokens: int = 0  # real frames, 1 / frame_rate seconds each
    cached_tokens: int = 0  # prompt positions taken from the prefix cache
    prompt_audio_tokens: int = 0  # real frames of the clips in the prompt

    @property
    def output_tokens(self) -> int:
        """Same as ``completion_tokens``, by the name that speech replies use."""
        return self.completion_tokens

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.audio_tokens + other.audio_tokens,
            self.cached_tokens + other.cached_tokens,
            self.prompt_audio_tokens + other.prompt_audio_tokens,
        )


@dataclass(frozen=True)
class SpeechStats:
    """Timings of one request, in seconds."""

    audio_duration_s: float = 0.0
    processing_time_s: float = 0.0  # from arrival to the last sample
    queue_time_s: float = 0.0  # from arrival to the first prefill step
    prefill_time_s: float = 0.0  # from there to the first frame
    decode_time_s: float = 0.0  # from the first frame to the last
    time_to_first_audio_s: float | None = None
    num_preemptions: int = 0
    num_parts: int = 1  # pieces that a long text was split into

    @property
    def realtime_factor(self) -> float:
        """Audio seconds made per second of processing (above 1 is faster than real time)."""
        return self.audio_duration_s / self.processing_time_s if self.processing_time_s else 0.0

    @property
    def rtf(self) -> float:
        """Processing seconds per second of audio (below 1 is faster than real time)."""
        return self.processing_time_s / self.audio_duration_s if self.audio_duration_s else 0.0


@dataclass(frozen=True)
class SpeechOutput:
    """Audio of one request: all of it from ``LLM``, an increment from ``AsyncLLM``.

    ``audio`` is float32 [num_samples] in [-1, 1] at ``sample_rate`` Hz. ``codes`` is int16
    [num_codebooks, num_frames] with the delay undone. ``delayed_codes`` is int16
    [num_steps, num_codebooks] as generated, BOS frame first. Increments joined in order along
    the time axis equal the whole. ``finish_reason`` is set on the last one only.
    """

    request_id: str
    audio: NDArray[np.float32]
    codes: NDArray[np.int16]
    delayed_codes: NDArray[np.int16]
    sample_rate: int
    finish_reason: FinishReason | None = None
    usage: Usage = field(default_factory=Usage)
    stats: SpeechStats = field(default_factory=SpeechStats)
    seed: int = 0  # the seed that was used, drawn at random when none was given
    error: str | None = None  # what went wrong, with finish_reason "error"

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
