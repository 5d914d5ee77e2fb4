"""Frames drawn where no host is asked: the torch form of ``kernels.sampler.DeviceSampler``.

Settings of all rows lie on the device, and every operation is done for every row, whether it
needs it or not, so that one recorded program serves all steps. Knows rows; knows no request.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm.kernels.sampler import SamplingMemory
from vllm.model_executor.heads import CodebookState
from vllm.platforms import copy_to_device
from vllm.sampling_params import MAX_RAS_WINDOW
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.repetition_aware import RasParams
from vllm.v1.sample.ops.temperature import Temperature
from vllm.v1.sample.ops.topk_topp import NO_TOP_P, TopKTopP
from vllm.v1.sample.sampler import Sampler

__all__ = ["FrameSampler", "TorchDeviceSampler"]


class FrameSampler(Protocol):
    """Draws frames of persistent rows; see ``kernels.sampler.DeviceSampler``."""

    def start_rows(self, rows: NDArray[np.int64], sampling: SamplingMemory) -> None:
        """Take over the settings of ``rows`` and let them run."""
        ...

    def __call__(self, logits: Tensor, rows: Tensor, results: Tensor) -> None:
        """Draw one frame for each row that runs; ``results`` is -1 for the others."""
        ...


class TorchDeviceSampler:
    """``DeviceSampler`` in plain torch: the same calls, the codes of ``Sampler`` to the bit.

    A row runs while its position is not negative. The last row is nobody's: what must not be
    written anywhere is written there.
    """

    def __init__(self, state: CodebookState, positions: Tensor) -> None:
        num_rows, device = len(positions), positions.device
        self._state = state
        self._sampler = Sampler(state.pattern)
        self._positions = positions
        # temperature, top-p
        self._reals = torch.zeros(num_rows, 2, device=device)  # [num_rows, 2]
        # top-k, seed, RAS window, RAS repeats, RAS mode "block"
        self._integers = torch.zeros(num_rows, 5, dtype=torch.int64, device=device)  # [num_rows, 5]

    def start_rows(self, rows: NDArray[np.int64], sampling: SamplingMemory) -> None:
        device = self._reals.device
        reals = np.stack([sampling.temperature[rows], sampling.top_p[rows]], 1)
        integers = np.stack(
            [
                sampling.top_k[rows],
                sampling.seed[rows].view(np.int64),
                sampling.ras_window[rows],
                sampling.ras_repeats[rows],
                sampling.ras_blocks[rows],
            ],
            1,
        )
        ids = copy_to_device(rows, device)
        self._reals.index_copy_(0, ids, copy_to_device(reals, device))
        self._integers.index_copy_(0, ids, copy_to_device(integers, device))

    def __call__(self, logits: Tensor, rows: Tensor, results: Tensor) -> None:
        positions = self._positions[rows]
        is_idle = positions < 0
        rows = rows.masked_fill(is_idle, len(self._positions) - 1)
        metadata = self._metadata(rows, logits.shape[-1])
        frames = self._sampler.next_frames(logits.float(), rows, metadata, self._state)
        status = self._state.advance(rows, frames)
        self._positions.index_copy_(
            0, rows, (positions + 1).masked_fill_(is_idle | (status != 0), -1)
        )
        results[:, :-1].copy_(frames)
        results[:, -1].copy_(status)
        results.masked_fill_(is_idle[:, None], -1)

    def _metadata(self, rows: Tensor, vocab_size: int) -> SamplingMetadata:
        """All operations; one that a row has switched off leaves the row's bits as they are."""
        temperature, top_p = self._reals[rows].unbind(1)
        top_k, seed, window, repeats, blocks = self._integers[rows].unbind(1)
        is_greedy = temperature == 0
        keeps_all = (top_k < 1) | (top_k > vocab_size)
        top_k = top_k.masked_fill(keeps_all, vocab_size).masked_fill_(is_greedy, 1)
        top_p = top_p.masked_fill((top_p >= 1) | is_greedy, NO_TOP_P)
        window = window * (repeats > 0)
        return SamplingMetadata(
            rows=rows,
            seed=seed,
            temperature=Temperature(
                all_greedy=False,
                divisor=(temperature + is_greedy)[:, None, None],
                is_greedy=is_greedy[:, None],
            ),
            filters=TopKTopP(vocab_size, top_k[:, None, None], top_p[:, None, None]),
            ras_redraw=RasParams(MAX_RAS_WINDOW, window * (1 - blocks), repeats),
            ras_block=RasParams(MAX_RAS_WINDOW, window * blocks, repeats),
        )
