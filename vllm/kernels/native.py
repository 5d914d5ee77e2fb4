"""The native CPU library ``csrc/``: found, checked and opened; None where it is not to be had.

Knows the C interface's types and owns the thread pools. What the functions compute is documented
in ``csrc/api.h``, and their Python faces are modules of their own. ``ctypes`` lets go of the
interpreter lock during every call.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_float, c_int32, c_int64, c_uint32, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from vllm import envs
from vllm.exceptions import ConfigError
from vllm.logger import get_logger

__all__ = [
    "ABI_VERSION",
    "disabled",
    "isa",
    "loaded_library",
    "pool",
    "row_stride",
    "select_isa",
    "supported_isas",
]

logger = get_logger(__name__)

ABI_VERSION = 2  # HAV_ABI_VERSION of csrc/api.h

_PATH = Path(__file__).with_name("lib") / "libhav.so"

# Name -> (result, arguments). An int64 is a size, a stride or a count; a void pointer is memory
# or a handle.
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "hav_supported_isas": (c_char_p, ()),
    "hav_isa": (c_char_p, ()),
    "hav_select_isa": (c_int32, (c_char_p,)),
    "hav_pool_create": (c_void_p, (c_int32,)),
    "hav_pool_destroy": (None, (c_void_p,)),
    "hav_pool_num_threads": (c_int32, (c_void_p,)),
    "hav_rms_norm": (
        None,
        (c_void_p, c_void_p, c_int64, c_void_p, c_float, c_void_p, c_int64, c_int64, c_int64),
    ),
    "hav_linear_create": (
        c_void_p,
        (c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int32),
    ),
    "hav_linear_destroy": (None, (c_void_p,)),
    "hav_linear_num_bytes": (c_int64, (c_void_p,)),
    "hav_linear_apply": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_float),
            *(c_void_p, c_int64, c_int32),
        ),
    ),
    "hav_embed_codes": (
        None,
        (
            *(c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64),
            *(c_void_p, c_int64, c_int64),
        ),
    ),
    "hav_attend_rows": (
        None,
        (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64),
    ),
    "hav_rope_write_attend": (
        None,
        (*(c_void_p,) * 6, c_int64, c_void_p, c_int64),
    ),
    "hav_sample_frames": (None, (*(c_void_p,) * 4, c_int64, *(c_void_p,) * 3)),
    "hav_decode_step": (c_int32, (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p)),
    "hav_wave_decoder_create": (c_void_p, (c_void_p,)),
    "hav_wave_decoder_destroy": (None, (c_void_p,)),
    "hav_wave_decoder_num_bytes": (c_int64, (c_void_p,)),
    "hav_wave_decode": (
        c_int32,
        (c_void_p, c_void_p, c_void_p, *(c_int64,) * 4, c_void_p),
    ),
    "hav_uniform": (None, (c_void_p, c_void_p, c_int64, c_int64, c_uint32, c_void_p)),
}

_is_disabled = False


def loaded_library() -> ctypes.CDLL | None:
    """The library, or None: not built, of another version, or switched off."""
    return None if _is_disabled else _open()


@contextmanager
def disabled() -> Iterator[None]:
    """Within it, there is no library: tests compare both paths, in one process."""
    global _is_disabled
    before, _is_disabled = _is_disabled, True
    try:
        yield
    finally:
        _is_disabled = before


def supported_isas() -> list[str]:
    """Instruction sets that library and processor both have, best last; empty without a library."""
    lib = loaded_library()
    return lib.hav_supported_isas().decode().split() if lib else []


def isa() -> str | None:
    """Name of the instruction set in use; None without a library."""
    lib = loaded_library()
    return lib.hav_isa().decode() if lib else None


def select_isa(name: str) -> None:
    """Use this instruction set from now on; weights packed before keep theirs.

    Raises:
        ConfigError: library or processor do not have it.
    """
    lib = loaded_library()
    if lib is None or lib.hav_select_isa(name.encode()) != 0:
        allowed = ", ".join(supported_isas()) or "none, there is no native library"
        raise ConfigError(f"VLLM_CPU_ISA={name!r}: here there is {allowed}")


def pool() -> int | None:
    """Handle of this Python thread's pool, as wide as ``torch.set_num_threads`` says on it.

    So ``--cpu-threads`` and what the worker makes of it hold for both, and two threads of Python
    never wait for each other's work. None, which means one thread, is a valid handle too.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        return None
    held: _Pool | None = getattr(_local, "pool", None)
    if held is None or held.num_threads != num_threads:
        held = _local.pool = _Pool(num_threads)
    return held.handle


def row_stride(x: Tensor) -> int | None:
    """Elements from row to row of a matrix whose rows are contiguous; None for any other tensor."""
    if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        return None
    return x.stride(0)


class _Pool:
    """A thread pool that ends when its Python thread does."""

    def __init__(self, num_threads: int) -> None:
        lib = _open()
        assert lib is not None
        self.num_threads = num_threads
        self.handle: int | None = lib.hav_pool_create(num_threads)
        self._destroy = lib.hav_pool_destroy

    def __del__(self) -> None:
        if self.handle is not None:
            self._destroy(self.handle)


_local = threading.local()


def _forget_pools() -> None:
    """A forked child has the pools' memory but not their threads: it must not even end them."""
    held: _Pool | None = getattr(_local, "pool", None)
    if held is not None:
        held.handle = None
        del _local.pool


os.register_at_fork(after_in_child=_forget_pools)


@lru_cache(maxsize=1)
def _open() -> ctypes.CDLL | None:
    """Open the library; says once, in one line, what will compute on the CPU."""
    lib, what = _try_open()
    logger.info("CPU kernels: %s", what)
    return lib


def _try_open() -> tuple[ctypes.CDLL | None, str]:
    if not envs.VLLM_NATIVE:
        return None, "torch, as VLLM_NATIVE=0 says"
    if not _PATH.exists():
        return None, "torch; the faster native ones were not built, see docs/kernels.md"
    try:
        lib = ctypes.CDLL(str(_PATH))
        lib.hav_abi_version.restype = c_int32
        version = lib.hav_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"torch, because {_PATH.name} does not load: {error}"
    if version != ABI_VERSION:
        return None, f"torch, because {_PATH.name} is of version {version} and not {ABI_VERSION}"
    missing = [name for name in _SIGNATURES if not hasattr(lib, name)]
    if missing:
        return None, f"torch, because {_PATH.name} lacks {', '.join(missing)}: build it again"
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    _apply_isa(lib)
    return lib, f"native, for {lib.hav_isa().decode()}"


def _apply_isa(lib: ctypes.CDLL) -> None:
    name = envs.VLLM_CPU_ISA
    if name is not None and lib.hav_select_isa(name.encode()) != 0:
        allowed = lib.hav_supported_isas().decode().replace(" ", ", ")
        raise ConfigError(f"VLLM_CPU_ISA={name!r} is none of {allowed}")
