"""What crosses the border between the API side and the engine core, in either direction.

Standard-library dataclasses; arrays travel as bytes, so that the IPC client can encode them
without copying element by element. Knows nothing of sockets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.outputs import FinishReason
from vllm.player import Listener
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import CodecStats

__all__ = [
    "STEP_TOKEN_BUCKETS",
    "ClipData",
    "EngineCoreCommand",
    "EngineCoreOutput",
    "EngineCoreOutputs",
    "EngineCoreRequest",
    "EngineInfo",
    "EngineStats",
    "RequestStats",
    "SchedulerStats",
]

STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class ClipData:
    """One clip of a prompt: int16 codes [num_codebooks, num_frames], or float32 samples."""

    start: int  # first prompt position of its delayed frames
    num_frames: int
    codes: bytes | None = None
    samples: bytes | None = None


@dataclass(frozen=True)
class EngineCoreRequest:
    """One utterance, complete: the engine asks nothing back."""

    request_id: str
    prompt_token_ids: bytes  # int32 [num_prompt_positions]
    sampling_params: SamplingParams
    seed: int
    frame_limit: int  # delayed frames, BOS frame and ramp included
    limit_reason: FinishReason  # why the limit is where it is
    clips: tuple[ClipData, ...] = ()
    max_silence_frames: int | None = None
    num_pinned_positions: int = 0  # from the start; whole blocks of these stay in the cache longest
    arrival_time: float = 0.0  # time.monotonic() of the machine
    priority: int = 0  # smaller is sooner
    listener: Listener | None = None  # None: nobody plays the audio while it is made


@dataclass(frozen=True)
class EngineCoreCommand:
    """The one message to the engine process; every field may be empty."""

    add: tuple[EngineCoreRequest, ...] = ()
    abort: tuple[str, ...] = ()  # request ids; unknown ones are ignored
    abort_reason: FinishReason = FinishReason.ABORT
    probe: bool = False  # wants a message in return, as a sign of life
    shutdown: bool = False


@dataclass(frozen=True)
class RequestStats:
    """Timings and counts that only the engine knows; sent with the last output."""

    queue_time_s: float = 0.0
    prefill_time_s: float = 0.0
    decode_time_s: float = 0.0
    num_cached_positions: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True)
class EngineCoreOutput:
    """New audio of one request, or its end, or both."""

    request_id: str
    audio: bytes = b""  # float32 [num_samples]
    codes: bytes = b""  # int16 [num_codebooks, num_frames], delay undone
    delayed_codes: bytes = b""  # int16 [num_steps, num_codebooks]
    finish_reason: FinishReason | None = None
    error: str | None = None
    stats: RequestStats | None = None  # with finish_reason only


@dataclass(frozen=True)
class SchedulerStats:
    """State of the queues and the cache after a step."""

    num_running: int = 0
    num_waiting: int = 0
    num_finishing: int = 0  # generated, audio still being decoded
    kv_cache_usage: float = 0.0  # share of blocks in use
    num_pinned_blocks: int = 0  # in use or not
    prefix_cache_queries: int = 0  # positions asked for, since start
    prefix_cache_hits: int = 0  # positions found, since start
    num_preemptions: int = 0  # since start
    # Steps since start by the positions they computed: up to each of STEP_TOKEN_BUCKETS (and above
    # the one before), then those above the last.
    step_token_counts: tuple[int, ...] = (0,) * (len(STEP_TOKEN_BUCKETS) + 1)
    num_step_tokens: int = 0  # positions of all these steps


@dataclass(frozen=True)
class EngineStats:
    """Figures of the whole engine after a step."""

    scheduler: SchedulerStats = field(default_factory=SchedulerStats)
    codec: CodecStats = field(default_factory=CodecStats)
    num_clip_queries: int = 0  # reference clips that came as samples, since start
    num_clip_hits: int = 0  # of these, the ones that were not encoded anew


@dataclass(frozen=True)
class EngineInfo:
    """What the API side must know of a loaded engine; sent once, when it is ready."""

    architecture: str
    num_codebooks: int
    sample_rate: int
    hop_length: int
    can_encode: bool  # False: the codec cannot encode reference clips
    codec_fingerprint: str
    max_model_len: int
    max_num_seqs: int
    num_kv_blocks: int
    max_pinned_blocks: int  # 0 without prefix caching
    device: str
    dtype: str
    tokenizer_folder: str  # resolved on disk, for the API side's tokenizer
    model_folder: str
    embedded: bool = False  # the model that ships with the package
    voices_folder: str = ""  # presets that the model brings along; empty: the shipped ones

    @property
    def frame_rate(self) -> float:
        """Audio frames per second."""
        return self.sample_rate / self.hop_length


@dataclass(frozen=True)
class EngineCoreOutputs:
    """The one message from the engine process: what one step has to say."""

    outputs: tuple[EngineCoreOutput, ...] = ()
    stats: EngineStats = field(default_factory=EngineStats)
    info: EngineInfo | None = None  # in the first message of a process that is ready
    failure: str | None = None  # in the last message of a process that could not start or go on
