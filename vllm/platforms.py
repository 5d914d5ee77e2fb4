"""CPU or CUDA, decided once: device, number type and memory figures.

Knows the machine; deliberately knows no model and no request.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm.exceptions import ConfigError

__all__ = [
    "MemoryFigures",
    "Platform",
    "activation_dtype",
    "check_dependent_launch",
    "copy_to_device",
    "is_lost",
    "num_cores",
    "resolve_dtype",
    "resolve_kv_dtype",
    "select_platform",
    "use_float32_convolutions",
]

_TOPOLOGY = Path("/sys/devices/system/cpu")

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class MemoryFigures:
    """Bytes of a device: all of it, and what a new allocation could still get."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Platform:
    """The device that one engine process computes on."""

    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def default_dtype(self) -> torch.dtype:
        """What ``dtype="auto"`` means here."""
        return torch.bfloat16 if self.is_cuda else torch.float32

    @property
    def compute_capability(self) -> int | None:
        """90 for 9.0; None where there is no CUDA."""
        if not self.is_cuda:
            return None
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    def memory(self) -> MemoryFigures:
        """Memory now."""
        if self.is_cuda:
            free, total = torch.cuda.mem_get_info(self.device)
            return MemoryFigures(total_bytes=total, free_bytes=free)
        page = os.sysconf("SC_PAGE_SIZE")
        return MemoryFigures(
            total_bytes=page * os.sysconf("SC_PHYS_PAGES"),
            free_bytes=page * os.sysconf("SC_AVPHYS_PAGES"),
        )


def num_cores(topology: Path = _TOPOLOGY) -> int:
    """Physical cores that this process may use.

    Two hardware threads of one core share its arithmetic, so products gain nothing from the second.

    Args:
        topology: where Linux describes its processors; without it, every one counts as a core.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_siblings(topology, cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(topology: Path, cpu: int) -> str:
    """Names the core of a hardware thread, by all threads on it."""
    try:
        return (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def select_platform(device: Literal["auto", "cpu", "cuda"] = "auto") -> Platform:
    """The platform for ``--device``; ConfigError when CUDA is asked for and absent."""
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device; use --device cpu")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device!r} is none of auto, cpu, cuda")
    use_cuda = has_cuda and device != "cpu"
    return Platform(torch.device("cuda", 0) if use_cuda else torch.device("cpu"))


def resolve_dtype(name: str, platform: Platform) -> torch.dtype:
    """Number type for ``--dtype`` on a platform; ConfigError for a name that is none."""
    if name == "auto":
        return platform.default_dtype
    if name not in _DTYPES:
        raise ConfigError(f"--dtype {name!r} is none of auto, {', '.join(_DTYPES)}")
    if name == "bfloat16" and platform.is_cuda and not torch.cuda.is_bf16_supported():
        raise ConfigError("--dtype bfloat16: this card has none; use float16")
    return _DTYPES[name]


def check_dependent_launch(name: str, platform: Platform) -> None:
    """ConfigError for a ``--dependent-launch`` that the platform does not have."""
    capability = platform.compute_capability
    if name == "off" or (capability is not None and capability >= 90):
        return
    there = "the CPU has none" if capability is None else f"this card has {capability / 10:.1f}"
    raise ConfigError(f"--dependent-launch {name}: needs compute capability 9.0, and {there}")


def use_float32_convolutions() -> None:
    """Keep cuDNN from rounding float32 inputs to TF32, as it does unless it is told otherwise.

    What TF32 leaves of a codec's samples is 38 to 47 dB, ``benchmarks.codec_decode --rounding``.
    """
    torch.backends.cudnn.allow_tf32 = False


def copy_to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """``values`` on a device, in the order of its stream, without a wait for what runs there.

    On a CPU they share memory, so they must not change afterwards.
    """
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    # Memory from torch's pinned pool is given away again only when the copy is done.
    return host.pin_memory().to(device, non_blocking=True)


def is_lost(device: torch.device) -> bool:
    """Whether a device takes no work any more, as after an illegal access; waits for its work."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def activation_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """Number type of what goes from layer to layer beside weights of a type.

    On a CPU, bfloat16 saves the reading of weights and nothing else: what a product gives stays
    float32. A GPU writes activations to memory between its kernels, and keeps them narrow.
    """
    is_wide = device.type == "cpu" and weights == torch.bfloat16
    return torch.float32 if is_wide else weights


def resolve_kv_dtype(name: str, weights: torch.dtype, platform: Platform) -> torch.dtype:
    """Number type for ``--kv-cache-dtype``; ConfigError for one that the platform has no use for.

    Args:
        name: auto, which is the type of the weights, float32, bfloat16, or fp8, which is e4m3
            without a scale.
        weights: number type of the weights.
        platform: where the cache lives.
    """
    if name == "fp8":
        return _resolve_fp8(platform)
    dtype = weights if name == "auto" else _DTYPES[name]
    if platform.is_cuda and dtype != weights:
        raise ConfigError(
            f"--kv-cache-dtype {name}: on CUDA the KV cache has the type of the weights, or fp8; "
            "choose the former with --dtype"
        )
    return dtype


def _resolve_fp8(platform: Platform) -> torch.dtype:
    if not platform.is_cuda:
        raise ConfigError("--kv-cache-dtype fp8: needs CUDA; the CPU has float32 and bfloat16")
    major, minor = torch.cuda.get_device_capability(platform.device)
    if (major, minor) < (8, 9):
        raise ConfigError(
            f"--kv-cache-dtype fp8: needs compute capability 8.9, and this card has {major}.{minor}"
        )
    return torch.float8_e4m3fn
