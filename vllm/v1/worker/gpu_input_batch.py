"""Rows of requests: who owns which, and how each is sampled.

A request owns one row from admission to finish or preemption. Block tables and the state of a
model family are kept elsewhere, under the same row numbers.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from vllm.kernels.sampler import SamplingMemory
from vllm.sampling_params import SamplingParams
from vllm.v1.sample import RowSettings, SamplingMetadata

__all__ = ["InputBatch"]


class InputBatch:
    """Persistent rows and the sampling metadata of the rows of a step.

    Metadata is kept while the rows of a step and their owners stay the same, so a steady decode
    step rebuilds nothing.

    Args:
        max_num_reqs: rows there are.
        vocab_size: codes of one codebook, BOS and EOS included.
        device: where the metadata goes.
    """

    def __init__(self, max_num_reqs: int, vocab_size: int, device: torch.device | str) -> None:
        self.max_num_reqs = max_num_reqs
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._settings = RowSettings(max_num_reqs)
        self._rows: dict[str, int] = {}  # req_id -> row
        self._free = list(range(max_num_reqs))  # heap: low rows first keep the batch dense
        self._metadata_rows: tuple[int, ...] = ()
        self._metadata: SamplingMetadata | None = None

    @property
    def rows(self) -> Mapping[str, int]:
        """Row of each request, read-only."""
        return MappingProxyType(self._rows)

    @property
    def sampling_memory(self) -> SamplingMemory:
        """Settings of all rows, for native code."""
        return self._settings.memory

    def add_request(self, req_id: str, params: SamplingParams, seed: int) -> int:
        """Give ``req_id`` a row and return it.

        ``seed`` is the one in use, as 0 … 2**64 - 1. The caller has made sure that a row is free
        and that the request has none.
        """
        assert req_id not in self._rows, f"request {req_id} has a row"
        assert self._free, "no free row"
        row = heapq.heappop(self._free)
        self._rows[req_id] = row
        self._settings.set_row(row, params, seed)
        self._metadata = None
        return row

    def remove_request(self, req_id: str) -> int:
        """Take the row of ``req_id`` back and return it."""
        row = self._rows.pop(req_id)
        heapq.heappush(self._free, row)
        self._metadata = None
        return row

    def sampling_metadata(self, rows: Sequence[int]) -> SamplingMetadata:
        """Settings of ``rows``, in this order."""
        key = tuple(rows)
        if self._metadata is None or key != self._metadata_rows:
            self._metadata = SamplingMetadata.of_rows(
                key, self._settings, self._vocab_size, self._device
            )
            self._metadata_rows = key
        return self._metadata

    def check_integrity(self) -> None:
        """Every row is free or owned, once."""
        owned = sorted([*self._rows.values(), *self._free])
        assert owned == list(range(self.max_num_reqs)), f"rows lost or shared: {owned}"
