"""Sampling of all codebooks and the streams' next state, natively, on the memory of their owners.

The Python face of ``csrc/sampler.cc`` and of ``triton/sampler.py``. What is correct is defined by
``v1.sample`` and by ``CodebookState``, which own the memory; nothing here knows a request.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm.kernels import native
from vllm.kernels.philox import Purpose

__all__ = [
    "MAX_CODEBOOK_SIZE",
    "DeviceSampler",
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
    """State of the streams of all persistent rows, as ``CodebookState`` keeps it."""

    last_frame: Tensor  # int64 [max_num_rows, num_codebooks]
    counters: Tensor  # int64 [max_num_rows, 6]
    history: Tensor  # int16 [max_num_rows, MAX_RAS_WINDOW, num_codebooks]
    bos: int
    eos: int

    def struct(self, codebook_size: int) -> StreamsStruct:
        """View for native code on the CPU, good while this object lives."""
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


class DeviceSampler:
    """Draws frames of persistent rows on a CUDA device: one launch, and nothing is read back.

    The call allocates nothing and its arguments keep their places, so a CUDA graph can hold it.
    Rows are idle until they are started and again once they have ended: an idle row's state does
    not change. A row's codes are its own in every bit, whatever the other rows of the step are.

    The noise is that of ``philox.uniform`` to the bit, and so are ties: equally likely codes stay
    or go together. Exponentials and sums round in another way than torch's, so that a draw whose
    number lies within rounding of the border between two codes may fall on the other side.

    Args:
        streams: state of all persistent rows, on the device, advanced.
        positions: int64 [max_num_rows], on the device: where each row's next frame goes. Advanced
            with every frame; -1 for a row that has ended.
        pdl: launch programmatically dependent on the kernel before, see ``docs/kernels.md``.
    """

    _NUM_SETTINGS = 8

    def __init__(self, streams: StreamMemory, positions: Tensor, *, pdl: bool = False) -> None:
        max_num_rows, device = len(streams.last_frame), streams.last_frame.device
        assert positions.shape == (max_num_rows,)
        self._streams = streams
        self._positions = positions
        self._pdl = pdl
        # Temperature and top-p (as bits), top-k, RAS window, repeats and mode, two words of seed.
        self._settings = torch.zeros(
            max_num_rows, self._NUM_SETTINGS, dtype=torch.int32, device=device
        )  # [max_num_rows, 8]
        # Codebooks of the current step that are done; 0 between steps, -1 for an idle row.
        self._arrivals = torch.full((max_num_rows,), -1, dtype=torch.int32, device=device)
        self._launch = import_module("vllm.kernels.triton.sampler").sample_frames

    def start_rows(self, rows: NDArray[np.int64], sampling: SamplingMemory) -> None:
        """Take over the settings of ``rows`` and let them run, from their streams' state on."""
        device = self._settings.device
        words, index = _upload(_settings_of(sampling, rows), device), _upload(rows, device)
        self._settings.index_copy_(0, index, words)
        self._arrivals.index_fill_(0, index, 0)

    def __call__(self, logits: Tensor, rows: Tensor, results: Tensor) -> None:
        """Draw one frame for each row that runs, and append it to the row's stream.

        Args:
            logits: [num_rows, num_codebooks, codebook_size], contiguous, of any float type.
            rows: int32 or int64 [num_rows], on the device, without duplicates; a negative one is
                padding.
            results: int16 [num_rows, num_codebooks + 1], contiguous, overwritten: the frame, then
                its ``FrameStatus``; -1 throughout for rows that are idle. Memory that the device
                can write, which includes pinned memory of the host.
        """
        assert logits.is_contiguous()
        assert results.is_contiguous()
        assert results.shape == (len(rows), logits.shape[1] + 1)
        self._launch(
            *(logits, rows, self._settings, self._streams),
            *(self._arrivals, self._positions, results),
            pdl=self._pdl,
        )


def _upload(values: NDArray[np.int32] | NDArray[np.int64], device: torch.device) -> Tensor:
    """From pinned memory: a copy from any other may wait for what runs on the device."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _settings_of(sampling: SamplingMemory, rows: NDArray[np.int64]) -> NDArray[np.int32]:
    """The rows of the device's table: [num_rows, 8]."""
    seed = sampling.seed[rows]
    columns = (
        sampling.temperature[rows].view(np.int32),
        sampling.top_p[rows].view(np.int32),
        sampling.top_k[rows].astype(np.int32),
        sampling.ras_window[rows].astype(np.int32),
        sampling.ras_repeats[rows].astype(np.int32),
        sampling.ras_blocks[rows].astype(np.int32),
        (seed & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32),
        (seed >> np.uint64(32)).astype(np.uint32).view(np.int32),
    )
    return np.stack(columns, axis=1)


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
