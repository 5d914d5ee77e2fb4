"""Sampling of all codebooks and the streams' next state, natively, on the memory of their owners.

The Python face of ``csrc/sampler.cc``. What is correct is defined by ``v1.sample`` and by
``CodebookState``, which own the memory; nothing here knows a request.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm.kernels import native
from vllm.kernels.philox import Purpose

__all__ = [
    "MAX_CODEBOOK_SIZE",
    "SamplingMemory",
    "SamplingStruct",
    "StreamMemory",
    "StreamsStruct",
    "native_uniform",
    "sample_frames",
]

MAX_CODEBOOK_SIZE = 4096  # HAV_MAX_CODEBOOK_SIZE of csrc/api.h


class StreamsStruct(ctypes.Structure):
    """``hav_streams``."""

    _fields_ = (
        ("last_frame", c_void_p),
        ("counters", c_void_p),
        ("history", c_void_p),
        ("num_codebooks", c_int64),
        ("codebook_size", c_int64),
        ("bos", c_int64),
        ("eos", c_int64),
    )


class SamplingStruct(ctypes.Structure):
    """``hav_sampling``."""

    _fields_ = (
        ("temperature", c_void_p),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("seed", c_void_p),
        ("ras_window", c_void_p),
        ("ras_repeats", c_void_p),
        ("ras_blocks", c_void_p),
    )


@dataclass(frozen=True, eq=False)
class StreamMemory:
    """State of the streams of all persistent rows, as ``CodebookState`` keeps it on a CPU."""

    last_frame: Tensor  # int64 [max_num_rows, num_codebooks]
    counters: Tensor  # int64 [max_num_rows, 6]
    history: Tensor  # int16 [max_num_rows, MAX_RAS_WINDOW, num_codebooks]
    bos: int
    eos: int

    def struct(self, codebook_size: int) -> StreamsStruct:
        """View for native code, good while this object lives."""
        assert codebook_size <= MAX_CODEBOOK_SIZE
        return StreamsStruct(
            self.last_frame.data_ptr(),
            self.counters.data_ptr(),
            self.history.data_ptr(),
            self.last_frame.shape[1],
            codebook_size,
            self.bos,
            self.eos,
        )


@dataclass(frozen=True, eq=False)
class SamplingMemory:
    """Sampling settings of all persistent rows, as ``RowSettings`` keeps them."""

    temperature: NDArray[np.float32]  # [max_num_rows]
    top_k: NDArray[np.int64]  # [max_num_rows]
    top_p: NDArray[np.float32]  # [max_num_rows]
    seed: NDArray[np.uint64]  # [max_num_rows]
    ras_window: NDArray[np.int64]  # [max_num_rows]
    ras_repeats: NDArray[np.int64]  # [max_num_rows]
    ras_blocks: NDArray[np.bool_]  # [max_num_rows]

    def struct(self) -> SamplingStruct:
        """View for native code, good while this object lives."""
        return SamplingStruct(
            *(
                each.ctypes.data
                for each in (
                    *(self.temperature, self.top_k, self.top_p, self.seed),
                    *(self.ras_window, self.ras_repeats, self.ras_blocks),
                )
            )
        )


def sample_frames(
    logits: Tensor, streams: StreamMemory, sampling: SamplingMemory, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Draw one frame for each row, and append it to the row's stream.

    Args:
        logits: float32 [num_rows, num_codebooks, codebook_size], contiguous, overwritten.
        streams: state of all persistent rows, advanced.
        sampling: settings of all persistent rows.
        rows: [num_rows], without duplicates.

    Returns:
        Frames [num_rows, num_codebooks] and ``FrameStatus`` [num_rows].
    """
    lib = native.loaded_library()
    assert lib is not None
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    num_rows, num_codebooks, codebook_size = logits.shape
    frames = np.empty((num_rows, num_codebooks), np.int16)
    status = np.empty(num_rows, np.uint8)
    lib.hav_sample_frames(
        native.pool(),
        ctypes.byref(streams.struct(codebook_size)),
        ctypes.byref(sampling.struct()),
        rows.ctypes.data,
        num_rows,
        logits.data_ptr(),
        frames.ctypes.data,
        status.ctypes.data,
    )
    return frames, status


def native_uniform(
    seed: NDArray[np.uint64], step: NDArray[np.int64], num_codebooks: int, purpose: Purpose
) -> NDArray[np.float32]:
    """The numbers of ``philox.uniform``, to the bit: [num_rows, num_codebooks]."""
    lib = native.loaded_library()
    assert lib is not None
    numbers = np.empty((len(seed), num_codebooks), np.float32)
    lib.hav_uniform(
        seed.ctypes.data, step.ctypes.data, len(seed), num_codebooks, purpose, numbers.ctypes.data
    )
    return numbers
