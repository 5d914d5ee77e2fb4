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

from vllm.platforms import copy_to_device

__all__ = ["BlockTable"]


class BlockTable:
    """Block ids of every row, in the order of their positions.

    Args:
        max_num_rows: rows there are.
        max_num_blocks: blocks that one request can need.
        device: where steps read the table.
        is_mirrored: the device has a table of its own, which follows in the order of its stream;
            otherwise steps read the host's, which only a CPU can.
    """

    def __init__(
        self, max_num_rows: int, max_num_blocks: int, device: torch.device, *, is_mirrored: bool
    ) -> None:
        self._host = np.zeros((max_num_rows, max_num_blocks), np.int64)
        self._num_blocks = np.zeros(max_num_rows, np.int64)  # [max_num_rows]
        self._device = device
        self._mirror = torch.from_numpy(self._host)
        if is_mirrored:
            self._mirror = torch.zeros(self._host.shape, dtype=torch.int64, device=device)
        self._is_mirrored = is_mirrored
        self._stale_rows: set[int] = set()

    @property
    def table(self) -> Tensor:
        """What steps read, int64 [max_num_rows, max_num_blocks]; stays the same tensor."""
        return self._mirror

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
        self.refresh()
        return self._mirror[rows, :num_blocks]

    def row(self, row: int, num_blocks: int) -> Tensor:
        """Table of one row on the device: int64 [num_blocks]."""
        self.refresh()
        return self._mirror[row, :num_blocks]

    def refresh(self) -> None:
        """Bring the device's table up to date for the steps that are launched from now on."""
        if self._is_mirrored and self._stale_rows:
            stale = np.array(sorted(self._stale_rows), np.int64)
            ids = copy_to_device(stale, self._device)
            self._mirror.index_copy_(0, ids, copy_to_device(self._host[stale], self._device))
        self._stale_rows.clear()
