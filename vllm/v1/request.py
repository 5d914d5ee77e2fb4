"""One request inside the engine: its prompt, its progress and the frames made so far.

Knows nothing of queues, blocks or batches; the scheduler moves a request from state to state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vllm.outputs import FinishReason
from vllm.player import Listener, VirtualPlayer
from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllm.v1.engine.messages import EngineCoreRequest

__all__ = ["Request", "RequestStatus"]

_BYTES_PER_CODE = np.dtype(np.int16).itemsize


class RequestStatus(StrEnum):
    """Where a request is; arrows only lead downwards, except that a swapped one comes back."""

    WAITING = "waiting"  # unknown to the worker
    PREFILLING = "prefilling"  # owns a row and blocks, prompt not wholly in the cache
    RUNNING = "running"  # owns a row and blocks, makes one frame per decode step
    SWAPPED = "swapped"  # row and pages lie on the host
    FINISHING = "finishing"  # all frames made, audio still being decoded
    FINISHED = "finished"  # its last output has been written


@dataclass(eq=False, kw_only=True, slots=True)
class Request:
    """Prompt and progress of one request.

    With P prompt positions, prefill fills positions 0 … P-1. The BOS frame (frame 0) is recorded
    when that is done; decode step i = 1, 2, … then writes position P+i-1 and makes frame i.
    """

    request_id: str
    prompt_token_ids: NDArray[np.int32]  # [num_prompt_positions]
    prompt_frames: NDArray[np.int16]  # [num_audio_positions, num_codebooks], delayed
    audio_positions: NDArray[np.int64]  # [num_audio_positions], rising
    sampling_params: SamplingParams
    seed: int
    frame_limit: int
    limit_reason: FinishReason
    max_silence_frames: int | None = None
    num_pinned_positions: int = 0
    priority: int = 0
    listener: Listener | None = None
    arrival_time: float = 0.0

    num_prompt_positions: int = field(init=False)
    num_codebooks: int = field(init=False)

    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    arrival_index: int = -1  # order of arrival at the scheduler
    player: VirtualPlayer | None = None  # of the listener
    last_turn: int = 0  # when it last was in a step over some of the rows; 0 before
    num_prefilled: int = 0  # prompt positions in the cache
    num_cached_positions: int = 0  # of these, found in the prefix cache
    num_preemptions: int = 0
    num_frames_in_flight: int = 0  # of decode steps that have begun, not recorded yet
    num_real_frames_sent: int = 0
    num_delayed_frames_sent: int = 0
    queued_time: float = 0.0
    prefill_start_time: float | None = None
    decode_start_time: float | None = None
    decode_end_time: float | None = None
    _frames: bytearray = field(default_factory=bytearray, repr=False)  # int16 [num_frames, K]
    _frame_size: int = field(init=False, repr=False)  # bytes

    def __post_init__(self) -> None:
        num_audio = self.audio_positions.shape[0]
        assert self.prompt_frames.ndim == 2, self.prompt_frames.shape
        assert self.prompt_frames.shape[0] == num_audio, (self.prompt_frames.shape, num_audio)
        # Not properties: every step asks every request for what follows from them.
        self.num_prompt_positions = int(self.prompt_token_ids.shape[0])
        self.num_codebooks = int(self.prompt_frames.shape[1])
        self._frame_size = self.num_codebooks * _BYTES_PER_CODE
        if self.listener is not None:
            self.player = VirtualPlayer(self.listener.speed, dry_at=self.listener.dry_at)

    @classmethod
    def from_core(
        cls,
        core_request: EngineCoreRequest,
        prompt_frames: NDArray[np.int16],
        audio_positions: NDArray[np.int64],
    ) -> Request:
        """Request of a message whose clips have been encoded and delayed.

        Args:
            core_request: the message.
            prompt_frames: int16 [num_audio_positions, num_codebooks], delayed, of all clips.
            audio_positions: prompt positions that these frames fill, rising.
        """
        return cls(
            request_id=core_request.request_id,
            prompt_token_ids=np.frombuffer(core_request.prompt_token_ids, np.int32),
            prompt_frames=np.ascontiguousarray(prompt_frames, np.int16),
            audio_positions=audio_positions,
            sampling_params=core_request.sampling_params,
            seed=core_request.seed,
            frame_limit=core_request.frame_limit,
            limit_reason=core_request.limit_reason,
            max_silence_frames=core_request.max_silence_frames,
            num_pinned_positions=core_request.num_pinned_positions,
            priority=core_request.priority,
            listener=core_request.listener,
            arrival_time=core_request.arrival_time,
        )

    @property
    def is_prefilled(self) -> bool:
        return self.num_prefilled >= self.num_prompt_positions

    @property
    def num_frames(self) -> int:
        """Delayed frames recorded, BOS frame included."""
        return len(self._frames) // self._frame_size

    @property
    def num_computed_positions(self) -> int:
        """Positions whose keys and values have been written, once the steps under way are done."""
        return self.num_prefilled + max(self.num_frames - 1, 0) + self.num_frames_in_flight

    @property
    def num_slots_needed(self) -> int:
        """Positions that must have a block before the next decode step."""
        return self.num_prompt_positions + (self.num_frames or 1) + self.num_frames_in_flight

    @property
    def num_unsent_frames(self) -> int:
        """Real frames made whose audio has not been sent."""
        return max(self.num_frames - self.num_codebooks - self.num_real_frames_sent, 0)

    @property
    def urgency(self) -> tuple[int, int]:
        """Sort key: the smallest is served first and preempted last."""
        return (self.priority, self.arrival_index)

    @property
    def owns_row(self) -> bool:
        return self.status in (RequestStatus.PREFILLING, RequestStatus.RUNNING)

    def append_frame(self, frame: bytes) -> None:
        """Record the next delayed frame, int16 [num_codebooks]."""
        self._frames += frame

    def record_bos_frame(self, bos_code: int) -> None:
        """Record frame 0, which the worker makes itself once the prompt is in the cache."""
        assert not self._frames, self.request_id
        self.append_frame(np.full(self.num_codebooks, bos_code, np.int16).tobytes())

    def truncate_frames(self, num_frames: int) -> None:
        """Forget all but the first ``num_frames`` delayed frames."""
        del self._frames[num_frames * self._frame_size :]

    def delayed_frames(self, start: int, stop: int) -> NDArray[np.int16]:
        """Copy of delayed frames [start, stop), int16 [at most stop - start, num_codebooks]."""
        part = bytes(self._frames[start * self._frame_size : stop * self._frame_size])
        return np.frombuffer(part, np.int16).reshape(-1, self.num_codebooks)

    def real_frames(self, start: int, stop: int, *, num_codes: int) -> NDArray[np.int16]:
        """Real frames [start, stop) with the delay undone, int16 [num_codebooks, stop - start].

        Code k of real frame u (from 0) is in delayed frame u + 1 + k, after the BOS frame.
        Codes of ``num_codes`` and above are not codes of the codec and become the largest one.
        """
        delayed = self.delayed_frames(start + 1, stop + self.num_codebooks)
        codebook = np.arange(self.num_codebooks)[:, None]  # [K, 1]
        frame = np.arange(stop - start)[None, :]  # [1, n]
        real: NDArray[np.int16] = np.clip(delayed[frame + codebook, codebook], 0, num_codes - 1)
        return real
