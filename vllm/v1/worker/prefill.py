"""How prefill steps are taken: what the runner asks for, and the way for steps of any size.

Positions are sorted by kind on the host, once for all layers. Knows rows, whose state others own;
knows no scheduler and no family. ``device_prefill`` holds the way for steps that are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm.forward_context import set_forward_context
from vllm.kernels.attention import PrefillMetadata, PrefillSequence
from vllm.kernels.linear_config import ROW_BUCKETS
from vllm.platforms import copy_to_device
from vllm.v1.core.sched_output import NewRequestData
from vllm.v1.worker.decoder import RowOwners

__all__ = ["EagerPrefill", "Prefiller", "PromptSlice", "SortedPrompt"]


class PromptSlice(NamedTuple):
    """Prompt positions [start, stop) of one request."""

    request: NewRequestData
    row: int  # that the request owns
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class SortedPrompt:
    """Prompt positions of several requests, N in all: text first, then audio."""

    ids: NDArray[np.int64]  # [num_text]
    frames: NDArray[np.int64]  # [num_audio, num_codebooks], delayed
    positions: NDArray[np.int64]  # [N]
    places: tuple[NDArray[np.int64], ...]  # per slice [length]: where its positions went, in order

    @classmethod
    def of(cls, slices: Sequence[PromptSlice]) -> SortedPrompt:
        """The positions of all slices."""
        ids, frames, positions, is_audio = _gather(slices)
        order = np.argsort(is_audio, kind="stable")
        place_of = np.empty_like(order)
        place_of[order] = np.arange(order.size)
        num_text = int(order.size - is_audio.sum())
        bounds = np.cumsum([0, *(part.stop - part.start for part in slices)])
        return cls(
            ids=ids[order[:num_text]].astype(np.int64),
            frames=frames.astype(np.int64),
            positions=positions[order],
            places=tuple(place_of[low:high] for low, high in pairwise(bounds)),
        )


class Prefiller(Protocol):
    """Takes prefill steps: keys and values of prompt positions into the cache, nothing sampled."""

    def run(self, slices: Sequence[PromptSlice]) -> None:
        """Begin a step, which may be under way when this returns.

        Args:
            slices: of different requests, at least one.
        """
        ...

    def warm_up(self) -> None:
        """Do whatever must not happen in the first steps."""
        ...


class EagerPrefill:
    """Steps of any size, launched one operation after the other.

    Args:
        owners: of what steps work on.
        device: of all of it.
    """

    def __init__(self, owners: RowOwners, device: torch.device) -> None:
        self._owners = owners
        self._device = device

    def run(self, slices: Sequence[PromptSlice]) -> None:
        self.run_sorted(slices, SortedPrompt.of(slices))

    def run_sorted(self, slices: Sequence[PromptSlice], prompt: SortedPrompt) -> None:
        """As ``run``, for slices that are sorted already."""
        owners, block_size = self._owners, self._owners.block_size
        sequences = [
            PrefillSequence(
                rows=self._to_device(places),
                block_table=owners.block_table.row(part.row, -(-part.stop // block_size)),
                start=part.start,
                length=part.stop - part.start,
            )
            for places, part in zip(prompt.places, slices, strict=True)
        ]
        metadata = PrefillMetadata.build(sequences, block_size)
        ids, frames = self._to_device(prompt.ids), self._to_device(prompt.frames)
        hidden = owners.state.embed_prompt(ids, frames)
        with set_forward_context(metadata, owners.kv_caches):
            owners.model.fill_cache(hidden, self._to_device(prompt.positions), len(ids))

    def warm_up(self) -> None:
        """Let kernels for every number of rows be built, with rows of both kinds.

        All positions lie in the block that nobody owns. The rows of one kind are just too many for
        half of the step, so that each number has kernels for it as well.
        """
        owners, device = self._owners, self._device
        spec = owners.model.spec
        for num_rows in sorted({min(rows, spec.max_model_len) for rows in ROW_BUCKETS}):
            rows = torch.arange(num_rows, device=device)
            num_blocks = -(-num_rows // owners.block_size)
            table = torch.full((num_blocks,), owners.spare_block, device=device)
            sequence = PrefillSequence(rows, table, start=0, length=num_rows)
            metadata = PrefillMetadata.build([sequence], owners.block_size)
            hidden = torch.zeros(num_rows, spec.hidden_size, dtype=spec.dtype, device=device)
            with set_forward_context(metadata, owners.kv_caches):
                owners.model.fill_cache(hidden, rows, num_rows // 2 + 1)

    def _to_device(self, values: NDArray[Any]) -> Tensor:
        return copy_to_device(np.ascontiguousarray(values, np.int64), self._device)


def _gather(
    slices: Sequence[PromptSlice],
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64], NDArray[np.bool_]]:
    """Ids [N], audio frames [num_audio, K], positions [N] and audio flags [N] of all slices."""
    ids, frames, positions, is_audio = [], [], [], []
    for request, _, start, stop in slices:
        low, high = np.searchsorted(request.audio_positions, (start, stop))
        flags = np.zeros(stop - start, np.bool_)
        flags[request.audio_positions[low:high] - start] = True
        ids.append(request.prompt_token_ids[start:stop])
        frames.append(request.prompt_frames[low:high])
        positions.append(np.arange(start, stop))
        is_audio.append(flags)
    return (
        np.concatenate(ids),
        np.concatenate(frames),
        np.concatenate(positions),
        np.concatenate(is_audio),
    )
