"""Prefill steps that are recorded, per bucket of text positions and of audio positions.

    run     sort by kind, fill up both kinds -> one upload -> replay
    step    ids, frames -> embed -> layers, over inputs that stay where they are

A step that no bucket holds is launched as it is; so large a one keeps the device busy while it is
launched. Rows that fill up a bucket write to a row and a block that nobody can own, and no other
row attends to them, so a row has the same bits in any bucket and in none. Knows no request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vllm.forward_context import set_forward_context
from vllm.kernels.attention import TiledPrefillMetadata
from vllm.kernels.prefill_attention import PREFILL_TILE, PrefillTiles, cut_tiles
from vllm.platforms import copy_to_device
from vllm.v1.worker.cuda_graphs import GraphBackend, StepGraphs
from vllm.v1.worker.decoder import RowOwners
from vllm.v1.worker.prefill import EagerPrefill, PromptSlice, SortedPrompt

__all__ = ["PrefillSize", "PrefillSizes", "RecordedPrefill"]

# Of each kind. Padding costs reading until about 320 rows, which are read for anyway, and products
# from there on, so they are not powers of two.
_BUCKETS = (64, 128, 256, 384, 512, 768)
# A whole step. Beyond it the device has more to do than the host needs for launching.
_MAX_ROWS = 768
_SPARE_TILES = 16  # sequences whose last tile is not full


class PrefillSize(NamedTuple):
    """What a recorded prefill step is made for."""

    num_text: int
    num_audio: int

    @property
    def num_rows(self) -> int:
        return self.num_text + self.num_audio

    @property
    def num_tiles(self) -> int:
        """Of attention; each sequence leaves at most one that is not full."""
        return -(-self.num_rows // PREFILL_TILE) + _SPARE_TILES


class PrefillSizes:
    """Sizes of prefill steps: each number of text positions with each of audio positions.

    Args:
        max_num_tokens: positions of a step.
    """

    def __init__(self, max_num_tokens: int) -> None:
        largest = min(max_num_tokens, _MAX_ROWS)
        self._buckets = (0, *(bucket for bucket in _BUCKETS if bucket < largest), largest)

    @property
    def all(self) -> list[PrefillSize]:
        """The largest first."""
        pairs = (PrefillSize(text, audio) for text in self._buckets for audio in self._buckets)
        sizes = (size for size in pairs if 0 < size.num_rows <= _MAX_ROWS)
        return sorted(sizes, key=lambda size: -size.num_rows)

    def size_for(self, num_text: int, num_audio: int, num_tiles: int) -> PrefillSize | None:
        """The smallest size that holds a step; None if none does."""
        if max(num_text, num_audio) > self._buckets[-1]:
            return None
        size = PrefillSize(
            self._buckets[bisect_left(self._buckets, num_text)],
            self._buckets[bisect_left(self._buckets, num_audio)],
        )
        return size if size.num_rows <= _MAX_ROWS and num_tiles <= size.num_tiles else None


class RecordedPrefill:
    """Takes prefill steps of usual sizes with one launch.

    Args:
        owners: of what steps work on. Block table and KV caches have one row, and one block, more
            than anybody can own, and the block is in that row.
        eager: takes the other steps.
        device: of all of it.
        graphs: record the steps.
        max_num_tokens: positions of a step.
    """

    def __init__(
        self,
        owners: RowOwners,
        eager: EagerPrefill,
        *,
        device: torch.device,
        graphs: GraphBackend,
        max_num_tokens: int,
    ) -> None:
        self._owners = owners
        self._eager = eager
        self._device = device
        self._sizes = PrefillSizes(max_num_tokens)
        sizes = self._sizes.all
        num_codebooks = owners.state.num_codebooks
        self._layouts = {size: _Layout.of(size, num_codebooks) for size in sizes}
        # All inputs of a step, so that they come in one copy. int64
        largest = max(layout.length for layout in self._layouts.values())
        self._inputs = torch.zeros(largest, dtype=torch.int64, device=device)
        self._graphs = StepGraphs(self._step, graphs, sizes)

    def run(self, slices: Sequence[PromptSlice]) -> None:
        prompt = SortedPrompt.of(slices)
        tiles = cut_tiles([len(each) for each in prompt.places], [part.start for part in slices])
        size = self._sizes.size_for(len(prompt.ids), len(prompt.frames), len(tiles))
        if size is None:
            self._eager.run_sorted(slices, prompt)
            return
        inputs = self._fill(size, slices, prompt, tiles)
        self._owners.block_table.refresh()
        self._inputs[: len(inputs)].copy_(copy_to_device(inputs, self._device))
        self._graphs.replay(size)

    def warm_up(self) -> None:
        """Run and record the steps of every size, before anybody owns a block."""
        self._eager.warm_up()
        self._inputs.zero_()
        self._graphs.record()

    def _fill(
        self,
        size: PrefillSize,
        slices: Sequence[PromptSlice],
        prompt: SortedPrompt,
        tiles: NDArray[np.int32],
    ) -> NDArray[np.int64]:
        """Inputs of a step; what is left of its size is padding."""
        owners, layout = self._owners, self._layouts[size]
        inputs = np.zeros(layout.length, np.int64)
        num_text = len(prompt.ids)
        inputs[layout.ids][:num_text] = prompt.ids
        inputs[layout.frames][: prompt.frames.size] = prompt.frames.ravel()
        # Audio begins behind the padding of text.
        rows = np.concatenate(prompt.places)
        rows[rows >= num_text] += size.num_text - num_text
        tables = np.repeat([part.row for part in slices], [len(each) for each in prompt.places])
        positions = np.concatenate([np.arange(part.start, part.stop) for part in slices])
        blocks = owners.block_table.host[tables, positions // owners.block_size]
        inputs[layout.rows][: len(rows)] = rows
        inputs[layout.positions][rows] = positions
        inputs[layout.slots] = owners.spare_block * owners.block_size
        inputs[layout.slots][rows] = blocks * owners.block_size + positions % owners.block_size
        inputs[layout.tables] = owners.spare_row
        inputs[layout.tables][rows] = tables
        own = inputs[layout.tiles].view(np.int32).reshape(-1, 4)
        own[: len(tiles)] = tiles
        own[: len(tiles), 0] = np.array([part.row for part in slices], np.int32)[tiles[:, 0]]
        return inputs

    def _step(self, size: PrefillSize) -> None:
        """The whole step, as operations on the device whose shapes follow from ``size``."""
        owners, layout = self._owners, self._layouts[size]
        inputs = self._inputs
        frames = inputs[layout.frames].view(-1, owners.state.num_codebooks)
        hidden = owners.state.embed_prompt(inputs[layout.ids], frames)
        metadata = TiledPrefillMetadata(
            slot_mapping=inputs[layout.slots],
            tables=inputs[layout.tables],
            positions=inputs[layout.positions],
            tiles=PrefillTiles(
                block_tables=owners.block_table.table,
                rows=inputs[layout.rows],
                tiles=inputs[layout.tiles].view(torch.int32).view(-1, 4),
            ),
        )
        with set_forward_context(metadata, owners.kv_caches):
            owners.model.fill_cache(hidden, metadata.positions, size.num_text)


@dataclass(frozen=True)
class _Layout:
    """Where the inputs of a step lie in one run of 64-bit integers."""

    ids: slice  # [num_text]
    frames: slice  # [num_audio, num_codebooks]
    positions: slice  # [num_rows]
    slots: slice  # [num_rows]
    tables: slice  # [num_rows]
    rows: slice  # [num_rows], those of a tile one after the other
    tiles: slice  # int32 [num_tiles, 4]

    @classmethod
    def of(cls, size: PrefillSize, num_codebooks: int) -> _Layout:
        """The layout for steps of a size."""
        counts = [
            *(size.num_text, size.num_audio * num_codebooks),
            *(size.num_rows,) * 4,
            2 * size.num_tiles,  # two numbers in each place
        ]
        bounds = np.cumsum([0, *counts]).tolist()
        return cls(*(slice(low, high) for low, high in pairwise(bounds)))

    @property
    def length(self) -> int:
        return int(self.tiles.stop)
