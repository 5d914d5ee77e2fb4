"""A whole decode step as one native call, which holds no interpreter lock.

The Python face of ``csrc/decode_step.cc``. It works on the memory of those who own rows, pages
and settings, so nothing is handed over between steps. The same step in torch is the model's
``forward`` with ``v1.sample``; nothing here knows a model's name or a request.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm.kernels import native
from vllm.kernels.decode_attention import KVCacheStruct, can_attend
from vllm.kernels.packed_linear import PackedMatrix
from vllm.kernels.sampler import (
    MAX_CODEBOOK_SIZE,
    SamplingMemory,
    SamplingStruct,
    StreamMemory,
    StreamsStruct,
)

__all__ = ["DecodeStep", "DecoderLayer", "DecoderRows", "DecoderWeights", "can_decode"]


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """Weights of one layer: attention, then a gated feed-forward block, each behind its norm."""

    input_norm: Tensor  # float32 [hidden_size]
    qkv: PackedMatrix  # queries, keys and values side by side
    output: PackedMatrix
    post_norm: Tensor  # float32 [hidden_size]
    gate_up: PackedMatrix  # gated
    down: PackedMatrix


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """Weights of a decoder over positions that hold one code per codebook."""

    embedding: Tensor  # float32 [num_codebooks * codebook_size, hidden_size]
    layers: tuple[DecoderLayer, ...]
    norm: Tensor  # float32 [hidden_size]
    head: PackedMatrix  # to num_codebooks * codebook_size
    cos: Tensor  # float32 [num_positions, 1, head_dim]
    signed_sin: Tensor  # as cos, the first half negated
    num_heads: int
    norm_eps: float
    codebook_size: int


@dataclass(frozen=True, eq=False)
class DecoderRows:
    """Where the persistent rows are kept; read and written by every step."""

    # Per layer float32 or bfloat16 [2, num_blocks, num_kv_heads, block_size, head_dim].
    kv_caches: Sequence[Tensor]
    block_tables: NDArray[np.int64]  # [max_num_rows, max_blocks]
    positions: NDArray[np.int64]  # [max_num_rows], where each row's last frame goes; not changed
    streams: StreamMemory
    sampling: SamplingMemory


class _LayerStruct(ctypes.Structure):
    """``hav_decoder_layer``."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("qkv", c_void_p),
        ("output", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("cache", KVCacheStruct),
    )


class _DecoderStruct(ctypes.Structure):
    """``hav_decoder``."""

    _fields_ = (
        ("num_layers", c_int64),
        ("layers", POINTER(_LayerStruct)),
        ("hidden_size", c_int64),
        ("num_heads", c_int64),
        ("norm_eps", c_float),
        ("embedding", c_void_p),
        ("cos", c_void_p),
        ("signed_sin", c_void_p),
        ("norm", c_void_p),
        ("head", c_void_p),
        ("block_tables", c_void_p),
        ("block_table_stride", c_int64),
        ("positions", c_void_p),
        ("streams", StreamsStruct),
        ("sampling", SamplingStruct),
    )


def can_decode(
    device: torch.device,
    *,
    activation_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    head_dim: int,
    codebook_size: int,
) -> bool:
    """Whether the library is there and takes steps of such a model with such a KV cache."""
    return (
        native.loaded_library() is not None
        and device.type == "cpu"
        and activation_dtype == torch.float32
        and can_attend(kv_dtype, head_dim)
        and codebook_size <= MAX_CODEBOOK_SIZE
    )


class DecodeStep:
    """Takes decode steps of persistent rows.

    A row's codes are its own in every bit: they depend neither on the other rows of the step nor
    on the number of threads.
    """

    def __init__(self, weights: DecoderWeights, rows: DecoderRows) -> None:
        lib = native.loaded_library()
        assert lib is not None, "ask can_decode() first"
        assert rows.block_tables.flags.c_contiguous
        self._function = lib.hav_decode_step
        self._num_codebooks = rows.streams.last_frame.shape[1]
        self._kept = (weights, rows)  # the structure points into them
        self._layers = _layer_structs(weights.layers, rows.kv_caches)
        self._struct = _DecoderStruct(
            len(weights.layers),
            self._layers,
            weights.norm.shape[0],
            weights.num_heads,
            weights.norm_eps,
            _memory(weights.embedding),
            _memory(weights.cos),
            _memory(weights.signed_sin),
            _memory(weights.norm),
            weights.head.handle,
            rows.block_tables.ctypes.data,
            rows.block_tables.shape[1],
            rows.positions.ctypes.data,
            rows.streams.struct(weights.codebook_size),
            rows.sampling.struct(),
        )
        self._address = ctypes.addressof(self._struct)

    def __call__(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """Draw the next frame of each row.

        Args:
            rows: [num_rows], contiguous, without duplicates.

        Returns:
            Frames [num_rows, num_codebooks] and ``FrameStatus`` [num_rows].

        Raises:
            MemoryError: there is none for the work; nothing has changed.
        """
        num_rows = len(rows)
        frames = np.empty((num_rows, self._num_codebooks), np.int16)
        status = np.empty(num_rows, np.uint8)
        result = self._function(
            native.pool(),
            self._address,
            rows.ctypes.data,
            num_rows,
            frames.ctypes.data,
            status.ctypes.data,
        )
        if result != 0:
            raise MemoryError(f"no memory for a step of {num_rows} rows")
        return frames, status


def _layer_structs(
    layers: Sequence[DecoderLayer], kv_caches: Sequence[Tensor]
) -> ctypes.Array[_LayerStruct]:
    structs = (_LayerStruct * len(layers))()
    for index, (layer, cache) in enumerate(zip(layers, kv_caches, strict=True)):
        structs[index] = _LayerStruct(
            _memory(layer.input_norm),
            _memory(layer.post_norm),
            layer.qkv.handle,
            layer.output.handle,
            layer.gate_up.handle,
            layer.down.handle,
            KVCacheStruct.of(cache),
        )
    return structs


def _memory(tensor: Tensor) -> int:
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    return tensor.data_ptr()
