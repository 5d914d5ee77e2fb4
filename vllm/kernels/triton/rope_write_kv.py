"""Rotates the keys of new positions and writes keys and values to their pages.

The form for CUDA of ``kernels.rope_write_kv``. Queries stay as they are: the attention that follows
rotates them as it reads them, so they are not written twice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["rope_write_kv", "rope_write_kv_kernel"]


def rope_write_kv(
    qkv: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    num_heads: int,
) -> None:
    """Arguments as of ``kernels.rope_write_kv``; all contiguous, ``head_dim`` a power of two."""
    num_kv_heads, block_size, head_dim = cache.shape[2:]
    rope_write_kv_kernel[(qkv.shape[0],)](
        *(qkv, cos, signed_sin, cache, slots, positions),
        cache.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HEADS=triton.next_power_of_2(num_kv_heads),
        num_warps=4,
    )


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"])
def rope_write_kv_kernel(
    qkv_ptr,  # [N, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM]
    cos_ptr,  # [num_positions, HEAD_DIM]
    signed_sin_ptr,  # as cos, the first half negated
    cache_ptr,  # [2, num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    slots_ptr,  # int64 [N], -1 for a row that is padding
    positions_ptr,  # int64 [N]
    value_offset,  # elements from a key to its value
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,  # NUM_KV_HEADS, rounded up to a power of two
):
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    position = tl.load(positions_ptr + row)
    head = tl.arange(0, HEADS)[:, None]
    first = tl.arange(0, HALF)[None, :]
    is_head = (head < NUM_KV_HEADS) & (first < HALF)
    angle = position * HEAD_DIM + first
    cos = tl.load(cos_ptr + angle).to(tl.float32)
    sin = tl.load(signed_sin_ptr + angle + HALF).to(tl.float32)

    keys = qkv_ptr + row * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    keys += (NUM_HEADS + head) * HEAD_DIM + first
    low = tl.load(keys, mask=is_head, other=0.0).to(tl.float32)
    high = tl.load(keys + HALF, mask=is_head, other=0.0).to(tl.float32)
    values = keys + NUM_KV_HEADS * HEAD_DIM
    value_low = tl.load(values, mask=is_head, other=0.0)
    value_high = tl.load(values + HALF, mask=is_head, other=0.0)

    page = slot // BLOCK_SIZE * NUM_KV_HEADS + head
    place = cache_ptr + (page * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + first
    kept: tl.constexpr = cache_ptr.dtype.element_ty
    # NOTE: rounded to the model's type first, so that a cache of 8 bits holds what its reference does.
    model: tl.constexpr = qkv_ptr.dtype.element_ty
    tl.store(place, (low * cos - high * sin).to(model).to(kept), mask=is_head)
    tl.store(place + HALF, (high * cos + low * sin).to(model).to(kept), mask=is_head)
    tl.store(place + value_offset, value_low.to(kept), mask=is_head)
    tl.store(place + value_offset + HALF, value_high.to(kept), mask=is_head)
