"""The paged KV cache of one layer: where a position lies, and how keys and values get there.

    cache[2, num_blocks, num_kv_heads, block_size, head_dim]      0 = keys, 1 = values
    slot = block * block_size + offset                            one position of one sequence

The positions of one head in one block lie together, so that attention copies whole blocks. A
block is cleared when a sequence gets it: attention masks what was not written, but a product of
an exact zero and what an unwritten page may hold must be zero too. Knows no attention and no
owner of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["allocate_kv_caches", "cache_rows", "clear_blocks", "slots_of_positions", "write_kv"]


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
    """One uninitialised cache per layer; ``clear_blocks`` comes before the first write."""
    shape = (2, num_blocks, num_kv_heads, block_size, head_dim)
    return [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]


def clear_blocks(caches: Sequence[Tensor], block_ids: Sequence[int]) -> None:
    """Make blocks that a sequence is about to fill hold numbers, in every layer."""
    ids = torch.tensor(block_ids, dtype=torch.int64, device=caches[0].device)
    for cache in caches:
        # Bytes, because torch does not fill every number type; zero is zero in all of them.
        cache.view(torch.uint8).index_fill_(1, ids, 0)


def slots_of_positions(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Slots of ``positions`` [N] of one sequence with ``block_table`` [blocks]: int64 [N]."""
    return block_table[positions // block_size] * block_size + positions % block_size


def cache_rows(slots: Tensor, cache: Tensor) -> Tensor:
    """Rows of a cache seen as [-1, head_dim] at which ``slots`` [N] lie.

    Returns:
        int64 [N * 2 * num_kv_heads]: for each slot, its keys' heads, then its values' heads.
    """
    _, num_blocks, num_kv_heads, block_size, _ = cache.shape
    heads = torch.arange(2 * num_kv_heads, device=slots.device)
    # The distance from a block's last key head to its first value head is that of all blocks.
    heads = heads + (heads // num_kv_heads) * (num_blocks - 1) * num_kv_heads
    first = slots // block_size * num_kv_heads
    rows = (first[:, None] + heads) * block_size + (slots % block_size)[:, None]
    return rows.flatten()


def write_kv(cache: Tensor, rows: Tensor, keys_values: Tensor) -> None:
    """Store ``keys_values`` [N, 2 * num_kv_heads, head_dim] at ``rows`` from ``cache_rows``.

    They are rounded to the cache's number type.
    """
    head_dim = cache.shape[-1]
    values = keys_values.reshape(-1, head_dim).to(cache.dtype)
    cache.view(-1, head_dim).index_copy_(0, rows, values)
