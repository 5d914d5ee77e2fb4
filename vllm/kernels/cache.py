"""The paged KV cache of one layer: where a position lies, and how keys and values get there.

    cache[2, num_blocks, block_size, num_kv_heads, head_dim]      0 = keys, 1 = values
    slot = block * block_size + offset                            one position of one sequence

Knows no attention and no owner of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["allocate_kv_caches", "slots_of_positions", "write_kv"]


def allocate_kv_caches(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """One uninitialised cache per layer; what was never written is never used."""
    shape = (2, num_blocks, block_size, num_kv_heads, head_dim)
    return [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]


def slots_of_positions(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Slots of ``positions`` [N] of one sequence with ``block_table`` [blocks]: int64 [N]."""
    return block_table[positions // block_size] * block_size + positions % block_size


def write_kv(cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Store ``keys`` and ``values`` [N, num_kv_heads, head_dim] at ``slots`` int64 [N]."""
    by_slot = cache.flatten(1, 2)
    by_slot[0].index_copy_(0, slots, keys)
    by_slot[1].index_copy_(0, slots, values)
