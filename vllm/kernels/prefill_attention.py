"""Causal attention of prompts and chunks of them over pages: Triton on CUDA, else the reference.

``attention`` has the form for every device, in which queries are rotated already. Knows no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm.kernels import reference

__all__ = ["PREFILL_TILE", "PrefillTiles", "cut_tiles", "plan_tiles", "rope_attend"]

PREFILL_TILE = 64  # queries


@dataclass(frozen=True, eq=False)
class PrefillTiles:
    """A prefill cut into runs of at most ``PREFILL_TILE`` positions of one sequence.

    Of fixed shapes, it can be filled anew for a recorded launch: rows that no tile names, and tiles
    without rows, are padding.
    """

    block_tables: Tensor  # int64 [num_sequences, max_blocks]
    rows: Tensor  # int64 [N], rows of the step, those of a tile one after the other
    tiles: Tensor  # int32 [T, 4]: sequence, first of ``rows``, number of rows, first position


def cut_tiles(lengths: Sequence[int], starts: Sequence[int]) -> NDArray[np.int32]:
    """``PrefillTiles.tiles`` of several sequences, those with the most keys first.

    So none that takes long begins late.

    Args:
        lengths: rows of each sequence.
        starts: position of each sequence's first row.
    """
    tiles, offset = [], 0
    for sequence, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        for first in range(0, length, PREFILL_TILE):
            count = min(PREFILL_TILE, length - first)
            tiles.append((sequence, offset + first, count, start + first))
        offset += length
    tiles.sort(key=lambda tile: -(tile[2] + tile[3]))
    return np.array(tiles, np.int32)


def plan_tiles(
    sequence_rows: Sequence[Tensor], block_tables: Sequence[Tensor], starts: Sequence[int]
) -> PrefillTiles:
    """Tiles of several sequences.

    Args:
        sequence_rows: of each sequence int64 [length], rows of the step in position order.
        block_tables: of each sequence int64 [blocks], which cover start + length positions.
        starts: position of each sequence's first row.
    """
    tiles = torch.from_numpy(cut_tiles([len(rows) for rows in sequence_rows], starts))
    return PrefillTiles(
        block_tables=pad_sequence(list(block_tables), batch_first=True),
        rows=torch.cat(list(sequence_rows)),
        tiles=tiles.to(sequence_rows[0].device, non_blocking=True),
    )


def rope_attend(
    qkv: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    tiles: PrefillTiles,
    num_heads: int,
    scale: float,
) -> Tensor:
    """Attention of the rows in ``tiles``, rotated here, whose keys and values are in their pages.

    Args:
        qkv: [N, (num_heads + 2 * num_kv_heads) * head_dim], contiguous; read only.
        cos: [num_positions, 1, head_dim].
        signed_sin: as ``cos``, the first half of the sines negated.
        cache: [2, num_blocks, num_kv_heads, block_size, head_dim]; types as of
            ``decode_attention.rope_write_attend``.
        tiles: of this step.
        num_heads: of the queries.
        scale: factor on the scores.

    Returns:
        [N, num_heads * head_dim], each row alone in its bits; undefined for rows in no tile.
    """
    if qkv.is_cuda:
        from vllm.kernels.triton import prefill_attention as on_cuda

        planned = (tiles.block_tables, tiles.rows, tiles.tiles)
        return on_cuda.rope_attend(qkv, cos, signed_sin, cache, *planned, num_heads, scale)
    tables = torch.zeros(len(qkv), dtype=torch.int64)
    positions = torch.full((len(qkv),), -1)
    for sequence, first, count, start in tiles.tiles.tolist():
        rows = tiles.rows[first : first + count]
        tables[rows] = sequence
        positions[rows] = torch.arange(start, start + count)
    sight = (tiles.block_tables, tables, positions)
    return reference.rope_attend(qkv, cos, signed_sin, cache, *sight, num_heads, scale)
