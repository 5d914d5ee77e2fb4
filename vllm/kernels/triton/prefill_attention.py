"""Causal attention of runs of positions over their pages: prompts, or chunks of them.

The form for CUDA of ``kernels.prefill_attention``. One program takes up to 64 queries of one head
and sequence, and that sequence's keys in tiles from position 0 on. A query's own sums do not depend on
which other queries are in its tile, and tiles that it does not see add exact zeros: so a chunk
boundary, a prefix that was there before, or other sequences change no bit. Knows no model.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm.kernels.prefill_attention import PREFILL_TILE
from vllm.kernels.triton.attention_parts import fold_tile, load_rotated, widened

__all__ = ["prefill_attention_kernel", "rope_attend"]


# As for decode steps: two tiles ahead.
_NUM_STAGES = 5


def rope_attend(
    qkv: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    tiles: Tensor,
    num_heads: int,
    scale: float,
    *,
    pdl: bool = False,
) -> Tensor:
    """Arguments as of ``kernels.prefill_attention.rope_attend`` and its ``PrefillTiles``.

    Args:
        pdl: launch before the previous kernel has ended, and wait for it on the device.

    Returns:
        [N, num_heads * head_dim]; undefined for rows in no tile.
    """
    num_kv_heads, block_size, head_dim = cache.shape[2:]
    assert head_dim >= 16, head_dim
    assert head_dim.bit_count() == 1, head_dim
    assert block_tables.stride(1) == 1
    assert qkv.is_contiguous()
    assert cache.is_contiguous()
    context = torch.empty(len(qkv), num_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    queries, keys = _shape(qkv.dtype)
    prefill_attention_kernel[(num_heads, PREFILL_TILE // queries, len(tiles))](
        *(qkv, cos, signed_sin, cache, block_tables, rows, tiles, context),
        scale * math.log2(math.e),
        cache.stride(0),
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        QUERIES=queries,
        KEYS=keys,
        PDL=pdl,
        num_warps=_num_warps(qkv),
        num_stages=_NUM_STAGES,
        launch_pdl=pdl,
    )
    return context


def _shape(dtype: torch.dtype) -> tuple[int, int]:
    """Queries and keys of a product. float32, which takes no tensor core, has room for fewer."""
    return (16, 32) if dtype == torch.float32 else (PREFILL_TILE, 64)


def _num_warps(qkv: Tensor) -> int:
    """Hopper's products are of four warps; elsewhere four would spill registers."""
    is_hopper = qkv.is_cuda and torch.cuda.get_device_capability(qkv.device)[0] == 9
    return 4 if is_hopper or qkv.dtype == torch.float32 else 8


# Compiled once: neither the width of a block table nor where a step's indices begin counts.
@triton.jit(
    do_not_specialize=["block_table_stride"],
    do_not_specialize_on_alignment=["block_tables_ptr", "rows_ptr", "tiles_ptr"],
)
def prefill_attention_kernel(
    qkv_ptr,  # [N, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM]
    cos_ptr,  # [num_positions, HEAD_DIM]
    signed_sin_ptr,  # as cos, the first half negated
    cache_ptr,  # [2, num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    block_tables_ptr,  # int [num_sequences, max_blocks]
    rows_ptr,  # int [num_rows], rows of qkv, those of a tile one after the other
    tiles_ptr,  # int32 [T, 4]: sequence, first of rows, number of rows (0: padding), first position
    context_ptr,  # [N, NUM_HEADS * HEAD_DIM]
    scale,  # factor on the scores, times log2(e)
    value_offset,  # elements from a key to its value
    block_table_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,  # of a program
    KEYS: tl.constexpr,  # of a tile
    PDL: tl.constexpr,
):
    model: tl.constexpr = qkv_ptr.dtype.element_ty
    head = tl.program_id(0)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    skipped = tl.program_id(1) * QUERIES
    tile = tiles_ptr + tl.program_id(2) * 4
    if PDL:
        tl.extra.cuda.gdc_wait()
    num_rows = tl.load(tile + 2) - skipped
    if num_rows <= 0:
        return
    block_table = block_tables_ptr + tl.load(tile).to(tl.int64) * block_table_stride
    first_position = tl.load(tile + 3) + skipped
    index = tl.arange(0, QUERIES)
    is_query = (index < num_rows)[:, None]
    # Queries that fill up the tile see what the last one sees: a softmax over nothing is no number.
    index = tl.minimum(index, num_rows - 1)
    row = tl.load(rows_ptr + tl.load(tile + 1) + skipped + index).to(tl.int64)[:, None]
    position = first_position + index
    dim = tl.arange(0, HEAD_DIM)
    angle = position.to(tl.int64)[:, None] * HEAD_DIM
    query = load_rotated(
        qkv_ptr + (row * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * HEAD_DIM,
        cos_ptr + angle,
        signed_sin_ptr + angle,
        dim[None, :],
        is_query,
        HEAD_DIM,
    ).to(model)

    maximum = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    context = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
    end = first_position + tl.minimum(num_rows, QUERIES)
    for first in range(0, end, KEYS):
        key = first + tl.arange(0, KEYS)
        is_key = key < end
        block = tl.load(block_table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        place = ((block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM
        keys = tl.load(cache_ptr + place[None, :] + dim[:, None], mask=is_key[None, :], other=0.0)
        values = tl.load(
            cache_ptr + value_offset + place[:, None] + dim[None, :],
            mask=is_key[:, None],
            other=0.0,
        )
        is_visible = key[None, :] <= position[:, None]
        maximum, total, context = fold_tile(
            *(query, widened(keys, model), widened(values, model), is_visible, scale),
            *(maximum, total, context),
        )
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    context_of = context_ptr + (row * NUM_HEADS + head) * HEAD_DIM + dim[None, :]
    tl.store(context_of, (context / total[:, None]).to(model), mask=is_query)
