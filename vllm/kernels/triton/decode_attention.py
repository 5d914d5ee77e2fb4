"""Attention of one new position per row over its pages, split over the context, in one launch.

The form for CUDA of ``kernels.decode_attention.rope_write_attend``.

    positions   0 ............ 255 | 256 .......... 511 | 512 ... p        one program per split, row
    split              0           |          1         |    2 ───┐        and key head
                       │                      │                   └ rotates and writes position p
                       └──────────┬───────────┴───────────┘
              whichever program arrives last adds the splits up, in their order

Splits and tiles begin at fixed positions of their own sequence and are added up in a fixed order, so
what a row gives depends neither on the other rows nor on which program was faster. Knows no model.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm.kernels.triton.attention_parts import fold_tile, load_rotated, widened

__all__ = ["SPLIT", "decode_attention_kernel", "rope_write_attend"]

SPLIT = 256  # positions

# Pages are found by a load of their own, which halves how far ahead keys are loaded: two tiles.
_NUM_STAGES = 5
_MIN_ROWS = 16  # of a product on tensor cores


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
    """Arguments as of the face, and what a recorded launch needs.

    Args:
        max_context_len: no position is this large; default: what the block tables hold. The grid
            has a program per split up to here, and those beyond a row's position return at once.
        arrivals: int32 [N * num_kv_heads or more], zeros, which it leaves as zeros; default: new ones.
            One serves all launches of a stream, which come one by one; after one that was aborted,
            zero it.
        pdl: launch before the previous kernel has ended, and wait for it on the device.

    Returns:
        [N, num_heads * head_dim]; undefined for rows that are padding.
    """
    num_kv_heads, block_size, head_dim = cache.shape[2:]
    assert head_dim >= 16, head_dim
    assert head_dim.bit_count() == 1, head_dim
    num_rows = qkv.shape[0]
    if max_context_len is None:
        max_context_len = block_tables.shape[1] * block_size
    if arrivals is None:
        arrivals = torch.zeros(num_rows * num_kv_heads, dtype=torch.int32, device=qkv.device)
    assert len(arrivals) >= num_rows * num_kv_heads
    num_splits = -(-max_context_len // SPLIT)
    group = num_heads // num_kv_heads
    count = num_rows * num_kv_heads * num_splits
    partials = torch.empty(count, group, head_dim, dtype=torch.float32, device=qkv.device)
    statistics = torch.empty(count, 2, _padded(group), dtype=torch.float32, device=qkv.device)
    assert block_tables.stride(1) == 1
    assert qkv.is_contiguous()
    assert cache.is_contiguous()
    context = torch.empty(num_rows, num_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    decode_attention_kernel[(num_splits, num_kv_heads, num_rows)](
        *(qkv, cos, signed_sin, cache, block_tables, tables, positions, context),
        *(partials, statistics, arrivals),
        scale * math.log2(math.e),
        cache.stride(0),
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SPLIT=SPLIT,
        TILE=_tile(qkv.dtype),
        ROWS=_padded(group),
        PDL=pdl,
        num_warps=4,
        num_stages=_NUM_STAGES,
        launch_pdl=pdl,
    )
    return context


def _padded(group: int) -> int:
    return max(_MIN_ROWS, 1 << (group - 1).bit_length())


def _tile(dtype: torch.dtype) -> int:
    return 32 if dtype == torch.float32 else 64


# Compiled once: neither the width of a block table nor where a step's indices begin counts.
@triton.jit(
    do_not_specialize=["block_table_stride"],
    do_not_specialize_on_alignment=["block_tables_ptr", "tables_ptr", "positions_ptr"],
)
def decode_attention_kernel(
    qkv_ptr,  # [N, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM]
    cos_ptr,  # [num_positions, HEAD_DIM]
    signed_sin_ptr,  # as cos, the first half negated
    cache_ptr,  # [2, num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    block_tables_ptr,  # int [num_sequences, max_blocks]
    tables_ptr,  # int [N], the sequence of each row
    positions_ptr,  # int [N], the new position of each row; negative for padding
    context_ptr,  # [N, NUM_HEADS * HEAD_DIM]
    partials_ptr,  # float32 [N, NUM_KV_HEADS, splits, GROUP, HEAD_DIM]
    statistics_ptr,  # float32 [N, NUM_KV_HEADS, splits, 2, ROWS], maximum and total
    arrivals_ptr,  # int32 [N, NUM_KV_HEADS], zeros
    scale,  # factor on the scores, times log2(e)
    value_offset,  # elements from a key to its value
    block_table_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,  # divides SPLIT
    ROWS: tl.constexpr,  # the group's queries, filled up
    PDL: tl.constexpr,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    model: tl.constexpr = qkv_ptr.dtype.element_ty
    kept: tl.constexpr = cache_ptr.dtype.element_ty
    split = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    position = tl.load(positions_ptr + row).to(tl.int32)
    num_splits = position // SPLIT + 1
    if (position < 0) | (split >= num_splits):
        return
    block_table = block_tables_ptr + tl.load(tables_ptr + row).to(tl.int64) * block_table_stride
    dim = tl.arange(0, HEAD_DIM)
    query_of = tl.arange(0, ROWS)[:, None]
    is_query = query_of < GROUP
    heads = qkv_ptr + row * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    angle = position.to(tl.int64) * HEAD_DIM
    query = load_rotated(
        heads + (head * GROUP + query_of) * HEAD_DIM,
        cos_ptr + angle,
        signed_sin_ptr + angle,
        dim[None, :],
        is_query,
        HEAD_DIM,
    ).to(model)

    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    context = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    end = tl.minimum((split + 1) * SPLIT, position)
    for first in range(split * SPLIT, end, TILE):
        key = first + tl.arange(0, TILE)
        is_visible = key < end
        block = tl.load(block_table + key // BLOCK_SIZE, mask=is_visible, other=0).to(tl.int64)
        place = ((block * NUM_KV_HEADS + head) * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM
        keys = tl.load(
            cache_ptr + place[None, :] + dim[:, None], mask=is_visible[None, :], other=0.0
        )
        values = tl.load(
            cache_ptr + value_offset + place[:, None] + dim[None, :],
            mask=is_visible[:, None],
            other=0.0,
        )
        maximum, total, context = fold_tile(
            *(query, widened(keys, model), widened(values, model), is_visible[None, :], scale),
            *(maximum, total, context),
        )

    if split == num_splits - 1:
        # The new position is taken from registers: no program reads what another one writes.
        key_ptr = heads + (NUM_HEADS + head) * HEAD_DIM
        new_key = load_rotated(
            key_ptr, cos_ptr + angle, signed_sin_ptr + angle, dim, dim < HEAD_DIM, HEAD_DIM
        )
        new_key = new_key.to(model).to(kept)
        new_value = tl.load(key_ptr + NUM_KV_HEADS * HEAD_DIM + dim).to(kept)
        block = tl.load(block_table + position // BLOCK_SIZE).to(tl.int64)
        place = ((block * NUM_KV_HEADS + head) * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM
        tl.store(cache_ptr + place + dim, new_key)
        tl.store(cache_ptr + value_offset + place + dim, new_value)
        products = query.to(tl.float32) * new_key.to(tl.float32)[None, :]
        score = tl.sum(products, 1) * scale
        new_maximum = tl.maximum(maximum, score)
        shrink = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(score - new_maximum)
        total = total * shrink + weight
        context = context * shrink[:, None]
        context += weight[:, None] * new_value.to(tl.float32)[None, :]
        maximum = new_maximum
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    context_of = context_ptr + (row * NUM_HEADS + head * GROUP + query_of) * HEAD_DIM + dim[None, :]
    if num_splits == 1:
        tl.store(context_of, (context / total[:, None]).to(model), mask=is_query)
        return
    owner = row * NUM_KV_HEADS + head
    first_partial = owner * tl.num_programs(0)
    partial_of = query_of * HEAD_DIM + dim[None, :]
    statistic_of = tl.arange(0, ROWS)
    partial = partials_ptr + (first_partial + split) * GROUP * HEAD_DIM + partial_of
    statistic = statistics_ptr + (first_partial + split) * 2 * ROWS + statistic_of
    tl.store(partial, context, mask=is_query)
    tl.store(statistic, maximum)
    tl.store(statistic + ROWS, total)
    # All threads have stored before one of them counts the program in.
    tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr + owner, 1, sem="acq_rel") < num_splits - 1:
        return

    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    context = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    partial = partials_ptr + first_partial * GROUP * HEAD_DIM + partial_of
    statistic = statistics_ptr + first_partial * 2 * ROWS + statistic_of
    for _ in range(0, num_splits):
        # NOTE: past the first-level cache, which knows nothing of other multiprocessors' stores.
        split_maximum = tl.load(statistic, cache_modifier=".cg")
        split_total = tl.load(statistic + ROWS, cache_modifier=".cg")
        split_context = tl.load(partial, mask=is_query, other=0.0, cache_modifier=".cg")
        new_maximum = tl.maximum(maximum, split_maximum)
        shrink = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(split_maximum - new_maximum)
        total = total * shrink + split_total * weight
        context = context * shrink[:, None] + split_context * weight[:, None]
        maximum = new_maximum
        partial += GROUP * HEAD_DIM
        statistic += 2 * ROWS
    tl.store(context_of, (context / total[:, None]).to(model), mask=is_query)
    tl.store(arrivals_ptr + owner, 0)
