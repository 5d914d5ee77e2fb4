"""Which KV blocks hold the positions of each row.

Rows of block ids, kept on the host and mirrored on the device; knows neither who owns a block
nor what is in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["BlockTable"]


class BlockTable:
    """Block ids of every row, in the order of their positions.

    Args:
        max_num_rows: rows there are.
        max_num_blocks: blocks that one request can need.
        device: where steps read the table.
    """

    def __init__(self, max_num_rows: int, max_num_blocks: int, device: torch.device | str) -> None:
        self._host = np.zeros((max_num_rows, max_num_blocks), np.int64)
        self._num_blocks = np.zeros(max_num_rows, np.int64)  # [max_num_rows]
        self._mirror = torch.from_numpy(self._host)  # on a CPU the same memory
        self._is_shared = torch.device(device).type == "cpu"
        if not self._is_shared:
            self._mirror = self._mirror.to(device)
        self._stale_rows: set[int] = set()

    @property
    def host(self) -> NDArray[np.int64]:
        """Table of all rows, [max_num_rows, max_num_blocks]; not to be written to."""
        return self._host

    def append(self, row: int, block_ids: Sequence[int]) -> None:
        """Add blocks behind those that the row has."""
        start = int(self._num_blocks[row])
        self._host[row, start : start + len(block_ids)] = block_ids
        self._num_blocks[row] = start + len(block_ids)
        self._stale_rows.add(row)

    def clear(self, row: int) -> None:
        """Forget the row's blocks; entries beyond a row's blocks are always 0."""
        self._host[row, : self._num_blocks[row]] = 0
        self._num_blocks[row] = 0
        self._stale_rows.add(row)

    def block_ids(self, row: int) -> list[int]:
        """Blocks of one row."""
        ids: list[int] = self._host[row, : self._num_blocks[row]].tolist()
        return ids

    def rows(self, rows: Tensor, num_blocks: int) -> Tensor:
        """Table of ``rows`` int64 [num_rows] on the device: int64 [num_rows, num_blocks]."""
        self._refresh()
        return self._mirror[rows, :num_blocks]

    def row(self, row: int, num_blocks: int) -> Tensor:
        """Table of one row on the device: int64 [num_blocks]."""
        self._refresh()
        return self._mirror[row, :num_blocks]

    def _refresh(self) -> None:
        if not self._is_shared and self._stale_rows:
            stale = sorted(self._stale_rows)
            self._mirror[stale] = torch.from_numpy(self._host[stale]).to(self._mirror.device)
        self._stale_rows.clear()
