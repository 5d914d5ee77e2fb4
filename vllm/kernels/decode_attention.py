"""Attention of single rows over the paged KV cache: native, or Triton on CUDA.

The Python face of ``csrc/decode_attention.cc`` and ``triton/decode_attention.py``. ``attention``
plans steps, has a form for every device, and calls ``attend_rows`` where that serves. Knows no
model and no request.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from vllm.kernels import native, reference
from vllm.kernels.quantize import WeightFormat

__all__ = ["AttentionStruct", "KVCacheStruct", "attend_rows", "can_attend", "rope_write_attend"]

_HEAD_QUANTUM = 16  # head_dim is a multiple of it
# Number types of caches, as the library numbers them.
_FORMATS = {
    torch.float32: list(WeightFormat).index(WeightFormat.FLOAT32),
    torch.bfloat16: list(WeightFormat).index(WeightFormat.BFLOAT16),
}


class KVCacheStruct(ctypes.Structure):
    """``hav_kv_cache``."""

    _fields_ = (
        ("keys", c_void_p),
        ("value_offset", c_int64),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("position_stride", c_int64),
        ("block_size", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("format", c_int32),
    )

    @classmethod
    def of(cls, cache: Tensor) -> KVCacheStruct:
        """View of a cache [2, num_blocks, num_kv_heads, block_size, head_dim], with any strides."""
        assert can_attend(cache.dtype, cache.shape[4])
        assert cache.stride(4) == 1
        sizes = (cache.shape[3], *cache.shape[2::2])
        return cls(cache.data_ptr(), *cache.stride()[:4], *sizes, _FORMATS[cache.dtype])


class AttentionStruct(ctypes.Structure):
    """``hav_attention``."""

    _fields_ = (
        ("block_tables", c_void_p),
        ("block_table_stride", c_int64),
        ("tables", c_void_p),
        ("positions", c_void_p),
        ("num_rows", c_int64),
        ("num_heads", c_int64),
        ("scale", c_float),
    )

    @classmethod
    def of(
        cls, block_tables: Tensor, tables: Tensor, positions: Tensor, num_heads: int, scale: float
    ) -> AttentionStruct:
        """Rows that see positions 0 .. ``positions`` of the sequences in ``block_tables``."""
        assert block_tables.stride(1) == 1
        return cls(
            block_tables.data_ptr(),
            block_tables.stride(0),
            tables.data_ptr(),
            positions.data_ptr(),
            len(tables),
            num_heads,
            scale,
        )


def can_attend(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the native form takes caches like this."""
    return dtype in _FORMATS and head_dim % _HEAD_QUANTUM == 0


def attend_rows(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    tables: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    """Attention of queries whose keys are all in the cache.

    Args:
        query: float32 [N, num_heads, head_dim], the heads of a row contiguous.
        cache: float32 or bfloat16 [2, num_blocks, num_kv_heads, block_size, head_dim].
        block_tables: int64 [num_sequences, max_blocks].
        tables: int64 [N], the sequence of each row.
        positions: int64 [N], the last position that each row sees.
        scale: factor on the scores.

    Returns:
        float32 [N, num_heads, head_dim]; each row alone in its bits.
    """
    lib = native.loaded_library()
    assert lib is not None
    num_heads, head_dim = query.shape[1:]
    assert query.dtype == torch.float32
    assert query.stride()[1:] == (head_dim, 1)
    context = torch.empty(query.shape)
    lib.hav_attend_rows(
        native.pool(),
        ctypes.byref(KVCacheStruct.of(cache)),
        ctypes.byref(AttentionStruct.of(block_tables, tables, positions, num_heads, scale)),
        query.data_ptr(),
        query.stride(0),
        context.data_ptr(),
        num_heads * head_dim,
    )
    return context


def rope_write_attend(
    qkv: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    tables: Tensor,
    positions: Tensor,
    num_heads: int,
    scale: float,
    *,
    max_context_len: int | None = None,
    arrivals: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Attention of one new position for each of N sequences, which is written to the cache first.

    Args:
        qkv: [N, (num_heads + 2 * num_kv_heads) * head_dim], contiguous; its queries and keys may
            be rotated in place.
        cos: [num_positions, 1, head_dim].
        signed_sin: as ``cos``, the first half of the sines negated.
        cache: [2, num_blocks, num_kv_heads, block_size, head_dim], of qkv's type; beside float32
            on the CPU also bfloat16; on CUDA also float8_e4m3fn (a card of compute capability 8.9
            or more), to which keys and values are rounded as they are: 448 is far above them, and
            no scale has to be known beforehand.
        block_tables: int64 [num_sequences, max_blocks].
        tables: int64 [N], the sequence of each row.
        positions: int64 [N], the new position of each; -1 for padding.
        num_heads: of the queries.
        scale: factor on the scores.
        max_context_len, arrivals, pdl: for recorded launches, see ``triton/decode_attention.py``.

    Returns:
        [N, num_heads * head_dim], each row alone in its bits; undefined for padding.
    """
    arguments = (qkv, cos, signed_sin, cache, block_tables, tables, positions, num_heads, scale)
    if qkv.is_cuda:
        from vllm.kernels.triton import decode_attention as on_cuda

        return on_cuda.rope_write_attend(
            *arguments, max_context_len=max_context_len, arrivals=arrivals, pdl=pdl
        )
    lib = native.loaded_library()
    is_native = qkv.dtype == torch.float32 and can_attend(cache.dtype, cache.shape[4])
    has_padding = bool((positions < 0).any())  # which the library does not know
    if lib is None or not is_native or has_padding:
        return reference.rope_write_attend(*arguments)
    assert qkv.is_contiguous()
    assert cos.is_contiguous()
    assert signed_sin.is_contiguous()
    width = num_heads * cache.shape[4]
    context = torch.empty(qkv.shape[0], width)
    lib.hav_rope_write_attend(
        native.pool(),
        ctypes.byref(KVCacheStruct.of(cache)),
        ctypes.byref(AttentionStruct.of(block_tables, tables, positions, num_heads, scale)),
        cos.data_ptr(),
        signed_sin.data_ptr(),
        qkv.data_ptr(),
        qkv.shape[1],
        context.data_ptr(),
        width,
    )
    return context
