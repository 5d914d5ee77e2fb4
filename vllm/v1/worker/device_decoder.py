"""Decode steps that live on a device: launched ahead, fed by themselves, never waited for.

    launch        upload what changed (rows, pages, settings) -> replay the step -> copy its result
    step          rows -> embed -> layers -> head -> sample -> state of the streams, positions
    FrameGetter   wait for that copy

Everything that a step reads lies in tensors that stay where they are, under the number of its row,
and the step ends by writing what the next one reads; so steps follow each other without the host.
A row whose position is negative is idle: it fills up a bucket, or it has ended. Knows rows; knows
no request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm.forward_context import set_forward_context
from vllm.kernels.attention import DecodeMetadata
from vllm.kernels.dependent_launch import DependentLaunch
from vllm.platforms import copy_to_device
from vllm.v1.worker.cuda_graphs import DecodeSizes, GraphBackend, StepGraphs, StepSize
from vllm.v1.worker.decoder import FrameGetter, RowOwners

__all__ = ["DeviceDecoder"]


class DeviceDecoder:
    """Takes decode steps without the host between them.

    Args:
        owners: of what steps work on. Block table, state and KV caches have one row, and one block,
            more than anybody can own; idle rows write there, if they write anything.
        device: of all of it.
        graphs: record the steps.
        batch_invariant: a row's frames do not depend on the rows beside it.
        pdl: whether launches of a step overlap, where a step is of few launches.
    """

    depth = 2  # one that runs and one that waits

    def __init__(
        self,
        owners: RowOwners,
        *,
        device: torch.device,
        graphs: GraphBackend,
        batch_invariant: bool,
        pdl: DependentLaunch = DependentLaunch.OFF,
    ) -> None:
        spec = owners.model.spec
        max_num_seqs = owners.batch.max_num_reqs
        self._owners = owners
        self._device = device
        self._spare_row = owners.spare_row
        owners.block_table.append(self._spare_row, [owners.spare_block])
        # Which rows the next step is over, padded with the spare one. int64 [max_num_seqs]
        self._rows = torch.full((max_num_seqs,), self._spare_row, device=device)
        # Where the last frame of each row goes, int64 [max_num_seqs + 1]; negative for idle rows.
        self._positions = torch.full((max_num_seqs + 1,), -1, device=device)
        self._fused_step = owners.state.fused_step(
            owners.kv_caches,
            owners.block_table.table,
            max_batch=max_num_seqs,
            batch_invariant=batch_invariant,
            pdl=pdl,
        )
        overlaps = self._fused_step is not None and pdl.is_on
        self._sampler = owners.state.device_sampler(self._positions, pdl=overlaps)
        # Frame and status of each row of a step, int16 [max_num_seqs, num_codebooks + 1]
        width = owners.state.num_codebooks + 1
        self._result = torch.zeros(max_num_seqs, width, dtype=torch.int16, device=device)
        self._ring = _ResultRing(self._result, self.depth)
        self._launched_rows = np.empty(0, np.int64)  # of the last step
        self._entered: set[int] = set()  # rows that the device has not heard of
        self._sizes = DecodeSizes(max_num_seqs, spec.max_model_len)
        self._graphs = StepGraphs(self._step, graphs, self._sizes.all)

    def enter(self, row: int) -> None:
        self._entered.add(row)

    def launch(self, rows: NDArray[np.int64]) -> FrameGetter:
        context_len = int(self._owners.positions[rows].max()) + 1
        size = self._sizes.size_for(len(rows), context_len)
        self._upload(rows, size.num_rows)
        self._graphs.replay(size)
        return self._ring.copy(len(rows))

    def warm_up(self) -> None:
        """Run and record the steps of every size, over the spare row alone."""
        self._owners.block_table.refresh()
        self._graphs.record()

    def _upload(self, rows: NDArray[np.int64], bucket: int) -> None:
        """Tell the device what has changed since the last launch; mostly nothing."""
        self._owners.block_table.refresh()
        if self._entered:
            entering = [row for row in rows.tolist() if row in self._entered]
            self._entered.difference_update(entering)
            if entering:
                self._upload_entering(np.array(entering, np.int64))
        if not np.array_equal(rows, self._launched_rows):
            padded = np.full(bucket, self._spare_row, np.int64)
            padded[: len(rows)] = rows
            self._rows[:bucket].copy_(copy_to_device(padded, self._device))
            self._launched_rows = rows

    def _upload_entering(self, rows: NDArray[np.int64]) -> None:
        self._sampler.start_rows(rows, self._owners.batch.sampling_memory)
        ids = copy_to_device(rows, self._device)
        positions = copy_to_device(self._owners.positions[rows], self._device)
        self._positions.index_copy_(0, ids, positions)

    def _step(self, size: StepSize) -> None:
        """The whole step, as operations on the device whose shapes follow from ``size``."""
        rows = self._rows[: size.num_rows]
        positions = self._positions[rows]
        if self._fused_step is not None:
            logits = self._fused_step(rows, positions, size.context_len)
        else:
            logits = self._forward(rows, positions, size.context_len)
        logits = logits.view(size.num_rows, self._result.shape[1] - 1, -1)
        self._sampler(logits, rows, self._result[: size.num_rows])

    def _forward(self, rows: Tensor, positions: Tensor, context_len: int) -> Tensor:
        """What the fused step computes, layer by layer."""
        owners = self._owners
        hidden = owners.state.embed_last_content(rows)
        written_rows = rows.masked_fill(positions < 0, self._spare_row)
        positions = positions.clamp(min=0)
        metadata = self._metadata(written_rows, positions, context_len)
        with set_forward_context(metadata, owners.kv_caches):
            hidden = owners.model.forward(hidden, positions, 0)
        return owners.model.audio_logits(hidden)

    def _metadata(self, rows: Tensor, positions: Tensor, context_len: int) -> DecodeMetadata:
        block_size = self._owners.block_size
        tables = self._owners.block_table.table[rows, : -(-context_len // block_size)]
        blocks = tables.gather(1, (positions // block_size)[:, None])[:, 0]
        return DecodeMetadata(
            slot_mapping=blocks * block_size + positions % block_size,
            block_tables=tables,
            context_lens=positions + 1,
            max_context_len=context_len,
        )


class _ResultRing:
    """Results on their way to the host, each in pinned memory of its own."""

    def __init__(self, result: Tensor, num_places: int) -> None:
        self._result = result
        is_cuda = result.device.type == "cuda"
        self._places: Sequence[Tensor] = [
            torch.zeros(result.shape, dtype=result.dtype, pin_memory=is_cuda)
            for _ in range(num_places)
        ]
        self._arrivals = [_new_event() if is_cuda else None for _ in range(num_places)]
        self._next = 0

    def copy(self, num_rows: int) -> FrameGetter:
        """Begin to copy the first rows of the result; good until as many copies have followed."""
        place, arrival = self._places[self._next], self._arrivals[self._next]
        self._next = (self._next + 1) % len(self._places)
        place[:num_rows].copy_(self._result[:num_rows], non_blocking=True)
        if arrival is not None:
            arrival.record()

        def wait() -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
            if arrival is not None:
                arrival.synchronize()
            values = place[:num_rows].numpy()
            return values[:, :-1].copy(), values[:, -1].astype(np.uint8)

        return wait


def _new_event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event
