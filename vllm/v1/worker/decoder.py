"""How decode steps are taken: what the runner asks for, and the way that needs no device.

Knows rows, whose state others own; knows no request and no codec. ``device_decoder`` holds the
other way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm.forward_context import set_forward_context
from vllm.kernels.attention import DecodeMetadata
from vllm.model_executor.models.interface import SpeechModel
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.model_state import ModelState

__all__ = ["Decoder", "FrameGetter", "HostDecoder", "RowOwners"]

# Waits for a step's frames int16 [num_rows, num_codebooks] and ``FrameStatus`` uint8 [num_rows].
FrameGetter = Callable[[], tuple[NDArray[np.int16], NDArray[np.uint8]]]


@dataclass(frozen=True, eq=False)
class RowOwners:
    """Model and memory that decode steps work on."""

    model: SpeechModel
    state: ModelState
    kv_caches: Sequence[Tensor]  # per layer [2, num_blocks, num_kv_heads, block_size, head_dim]
    block_size: int
    block_table: BlockTable
    batch: InputBatch
    positions: NDArray[np.int64]  # [rows], where each row's last frame goes; not changed

    @property
    def spare_row(self) -> int:
        """The row that nobody can own."""
        return self.batch.max_num_reqs

    @property
    def spare_block(self) -> int:
        """The block that nobody can own."""
        return self.kv_caches[0].shape[1] - 1


class Decoder(Protocol):
    """Takes decode steps of persistent rows."""

    @property
    def depth(self) -> int:
        """Steps that may have been launched before the first one's frames are taken."""
        ...

    def enter(self, row: int) -> None:
        """The row has a new owner, or one that comes back."""
        ...

    def launch(self, rows: NDArray[np.int64]) -> FrameGetter:
        """Begin a step over ``rows`` [num_rows], which has no duplicates.

        Rows that ended in a step whose frames have not been taken yet may be among them: nothing
        of theirs changes, and what comes back for them means nothing.
        """
        ...

    def warm_up(self) -> None:
        """Do whatever must not happen in the first steps."""
        ...


class HostDecoder:
    """Steps whose frames are there when the launch returns: natively, else with torch."""

    depth = 1

    def __init__(self, owners: RowOwners) -> None:
        self._owners = owners
        self._native_step = owners.state.native_step(
            owners.kv_caches,
            owners.block_table.host,
            owners.positions,
            owners.batch.sampling_memory,
        )

    def enter(self, row: int) -> None:
        """Nothing: steps read what the owners keep."""

    def launch(self, rows: NDArray[np.int64]) -> FrameGetter:
        taken = self._native_step(rows) if self._native_step is not None else self._step(rows)
        return lambda: taken

    def warm_up(self) -> None:
        """Nothing: the first step is as good as any."""

    def _step(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        owners = self._owners
        sampling = owners.batch.sampling_metadata(tuple(rows.tolist()))
        metadata = self._metadata(sampling.rows, owners.positions[rows])
        hidden = owners.state.embed_last_content(sampling.rows)
        with set_forward_context(metadata, owners.kv_caches):
            hidden = owners.model.forward(hidden, metadata.context_lens - 1, 0)
        content = owners.state.next_content(hidden, sampling.rows, sampling)
        frames, status = content.frames.numpy(), content.status.numpy()
        return frames.astype(np.int16), status

    def _metadata(self, rows: Tensor, positions: NDArray[np.int64]) -> DecodeMetadata:
        block_size = self._owners.block_size
        max_context_len = int(positions.max()) + 1
        tables = self._owners.block_table.rows(rows, -(-max_context_len // block_size))
        last = torch.from_numpy(positions)
        blocks = tables.gather(1, (last // block_size)[:, None])[:, 0]
        return DecodeMetadata(
            slot_mapping=blocks * block_size + last % block_size,
            block_tables=tables,
            context_lens=last + 1,
            max_context_len=max_context_len,
        )
