"""One frozen dataclass per concern, and ``EngineConfig`` that bundles them.

Command-line flags are made from these fields (``entrypoints.cli_args``), so a default and its
help text exist once. Values that depend on the device ("auto", 0) are resolved by the worker, which
says in ``WorkerInfo`` what they have become; nothing here looks at the machine.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vllm.exceptions import ConfigError
from vllm.sampling_params import MAX_RAS_WINDOW, RasMode

__all__ = [
    "DEFAULT_AUDIO_TOKENIZER",
    "EMBEDDED_MODEL_NAME",
    "RANDOM_MODEL_NAME",
    "AudioConfig",
    "CacheConfig",
    "DeviceConfig",
    "EngineConfig",
    "ModelConfig",
    "SchedulerConfig",
    "SpeechDefaults",
]

DEFAULT_AUDIO_TOKENIZER = "bosonai/higgs-audio-v2-tokenizer"
EMBEDDED_MODEL_NAME = "higgs-audio-tiny"
RANDOM_MODEL_NAME = "higgs-audio-random"
_TOY_NOTICE = (
    "a toy that shows and tests the engine, not always understood: one English voice, 898 words, "
    "other words by their letters"
)

_MAX_THREADS = 1024  # more than any machine's cores; OpenMP may end the process far above
_MAX_POSITIONS = 131_072  # ``max_position_embeddings`` of the published model

DType = Literal["auto", "float32", "bfloat16", "float16"]
KVCacheDType = Literal["auto", "float32", "bfloat16", "fp8"]


def _option(default: Any, help_text: str, **extra: Any) -> Any:
    """A field with its flag's help text; ``extra`` says how ``cli_args`` reads the flag."""
    return field(default=default, metadata={"help": help_text, **extra})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which language model is loaded, and how."""

    model: str | None = _option(
        None,
        "Hub id or folder of the model; none or higgs-audio-tiny is the embedded one, "
        "higgs-audio-random one of noise",
    )
    tokenizer: str | None = _option(None, "Hub id or folder of the tokenizer; default: the model's")
    revision: str | None = _option(None, "Hub revision of the model")
    download_dir: str | None = _option(None, "folder for Hub downloads; default: the Hub's cache")
    dtype: DType = _option(
        "auto",
        "number type of the weights: bfloat16 on CUDA and float32 on CPU when auto",
        aliases={"half": "float16", "float": "float32"},
    )
    quantization: Literal["int8", "int4", "fp8"] | None = _option(
        None,
        "weights in fewer bits: int8, int4 (CPU only) or fp8 (CUDA only); "
        "default: as the checkpoint was saved",
        also=("-q",),
    )
    max_model_len: int = _option(
        8192, "positions of one request: prompt plus audio frames", thousands=True
    )

    def __post_init__(self) -> None:
        _require(
            64 <= self.max_model_len <= _MAX_POSITIONS,
            f"--max-model-len {self.max_model_len}: from 64 to {_MAX_POSITIONS}",
        )
        _require(
            self.quantization in (None, "int8", "int4", "fp8"),
            f"--quantization {self.quantization!r}: int8, int4 or fp8",
        )


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """The codec, how its output is cut into chunks, and the guards on runaway output."""

    audio_tokenizer_type: str | None = _option(
        None, f"Hub id or folder of the codec; default {DEFAULT_AUDIO_TOKENIZER}"
    )
    audio_tokenizer_revision: str | None = _option(None, "Hub revision of the codec")
    stream_ramp: tuple[int, ...] = _option(
        (4, 8, 16, 25), "frames of the first audio chunks; the last value repeats"
    )
    max_audio_seconds: float = _option(300.0, "longest audio of one request; 0 is no limit")
    max_silence_seconds: float = _option(4.0, "silence after which audio is cut; 0 is no limit")
    text_length_guard: bool = _option(
        True, "end audio that is far longer than its text can need (4 s + 0.3 s per character)"
    )
    clip_cache_dir: str | None = _option(None, "folder for encoded reference clips")

    def __post_init__(self) -> None:
        _require(
            bool(self.stream_ramp) and all(n >= 1 for n in self.stream_ramp),
            f"--stream-ramp {self.stream_ramp}: one or more numbers of at least 1",
        )
        for name in ("max_audio_seconds", "max_silence_seconds"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"--{name.replace('_', '-')} {value}: 0 or more")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = _option(16, "positions per KV block")
    gpu_memory_utilization: float = _option(
        0.9, "share of the card's memory for weights, codec and KV cache"
    )
    kv_cache_memory: int = _option(
        0, "bytes of the KV cache, on any device; 0 chooses from the free memory"
    )
    kv_cache_dtype: KVCacheDType = _option(
        "auto",
        "number type of keys and values: that of the weights when auto (float32 beside int8 and "
        "int4); on the CPU float32 or bfloat16, on CUDA fp8",
    )
    enable_prefix_caching: bool = _option(True, "share KV blocks of equal prompt beginnings")

    def __post_init__(self) -> None:
        _require(
            0 < self.gpu_memory_utilization <= 1,
            f"--gpu-memory-utilization {self.gpu_memory_utilization}: in (0, 1]",
        )
        _require(self.kv_cache_memory >= 0, f"--kv-cache-memory {self.kv_cache_memory}: 0 or more")
        _require(
            self.kv_cache_dtype in get_args(KVCacheDType),
            f"--kv-cache-dtype {self.kv_cache_dtype!r}: {', '.join(get_args(KVCacheDType))}",
        )
        _require(
            self.block_size in (8, 16, 32, 64, 128),
            f"--block-size {self.block_size}: one of 8, 16, 32, 64, 128",
        )


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How many requests run together, and when prompts are prefilled."""

    max_num_seqs: int = _option(0, "requests decoded together; 0 is 256 on CUDA and 32 on CPU")
    max_num_batched_tokens: int = _option(1024, "prompt positions of one prefill step")
    prefill_min_tokens: int = _option(512, "waiting positions from which a prefill step runs")
    prefill_min_requests: int = _option(4, "waiting requests from which a prefill step runs")
    prefill_max_wait_ms: float = _option(10.0, "longest wait for more prompts to prefill together")
    player_deadlines: bool = _option(
        True, "when the device is saturated, serve first whose listeners would hear silence soonest"
    )

    def __post_init__(self) -> None:
        _require(self.max_num_seqs >= 0, f"--max-num-seqs {self.max_num_seqs}: 0 or more")
        _require(
            self.max_num_batched_tokens >= 16,
            f"--max-num-batched-tokens {self.max_num_batched_tokens}: at least 16",
        )
        for name in ("prefill_min_tokens", "prefill_min_requests", "prefill_max_wait_ms"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"--{name.replace('_', '-')} {value}: 0 or more")


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where the model runs."""

    device: Literal["auto", "cpu", "cuda"] = _option("auto", "auto takes CUDA when there is a card")
    cpu_threads: int = _option(
        0, "threads of the CPU path; 0 is all physical cores, or one for a small model"
    )
    batch_invariant: bool = _option(
        True, "a request's output does not depend on what else runs (bit for bit)"
    )
    enforce_eager: bool = _option(False, "no CUDA graphs")
    dependent_launch: Literal["off", "on", "prefetch"] = _option(
        "off",
        "on: kernels of a decode step start before the ones ahead have ended (compute capability "
        "9.0); prefetch: and ask for their first weights meanwhile",
    )
    codec_kernels: Literal["auto", "torch"] = _option(
        "auto",
        "auto decodes audio with the engine's own kernels where there are such for the device; "
        "torch: with torch's convolutions, in float32",
    )

    def __post_init__(self) -> None:
        _require(
            0 <= self.cpu_threads <= _MAX_THREADS,
            f"--cpu-threads {self.cpu_threads}: 0 to {_MAX_THREADS}",
        )
        _require(
            self.dependent_launch in ("off", "on", "prefetch"),
            f"--dependent-launch {self.dependent_launch!r}: off, on or prefetch",
        )
        _require(
            self.codec_kernels in ("auto", "torch"),
            f"--codec-kernels {self.codec_kernels!r}: auto or torch",
        )


@dataclass(frozen=True, kw_only=True)
class SpeechDefaults:
    """What a request gets that does not say otherwise."""

    ras_window_length: int = _option(7, "frames that RAS looks back; 0 switches it off")
    ras_max_num_repeat: int = _option(2, "repeats in the window from which a code is redrawn")
    ras_mode: RasMode = _option(
        "redraw", "redraw: the reference rule; block: repeated codes are masked"
    )

    def __post_init__(self) -> None:
        _require(
            0 <= self.ras_window_length <= MAX_RAS_WINDOW,
            f"--ras-window-length {self.ras_window_length}: 0 to {MAX_RAS_WINDOW}",
        )
        _require(
            self.ras_max_num_repeat >= 0,
            f"--ras-max-num-repeat {self.ras_max_num_repeat}: 0 or more",
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything the engine process needs, in one value."""

    model: ModelConfig = field(default_factory=ModelConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    defaults: SpeechDefaults = field(default_factory=SpeechDefaults)

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """Build from flat option names, as flags and ``LLM`` take them.

        Raises:
            ConfigError: an option is unknown or its value is not allowed.
        """
        remaining = dict(options)
        parts: dict[str, Any] = {}
        for concern in dataclasses.fields(cls):
            part_cls = _PARTS[concern.name]
            names = {f.name for f in dataclasses.fields(part_cls)} & remaining.keys()
            parts[concern.name] = part_cls(**{name: remaining.pop(name) for name in sorted(names)})
        _require(not remaining, f"unknown option: {', '.join(sorted(remaining))}")
        return cls(**parts)

    @property
    def uses_embedded_model(self) -> bool:
        return self.model.model in (None, EMBEDDED_MODEL_NAME)

    @property
    def notice(self) -> str:
        """What whoever hears a model that needs no download must know of it; else empty."""
        if self.uses_random_model:
            return "random weights: this model makes noise, not speech"
        return _TOY_NOTICE if self.uses_embedded_model else ""

    @property
    def uses_random_model(self) -> bool:
        """The embedded sizes with random weights, which encode clips and make noise."""
        return self.model.model == RANDOM_MODEL_NAME


_PARTS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "audio": AudioConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "device": DeviceConfig,
    "defaults": SpeechDefaults,
}
