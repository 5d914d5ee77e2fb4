"""What the sampler must know of the rows of one step; fields that no row needs are None.

Made anew only when the set of rows changes. Knows settings, neither requests nor logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm.kernels.sampler import SamplingMemory
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.ops.repetition_aware import RasParams, ras_params
from vllm.v1.sample.ops.temperature import Temperature
from vllm.v1.sample.ops.topk_topp import TopKTopP, top_k_top_p

__all__ = ["RowSettings", "SamplingMetadata"]

_MIN_TEMPERATURE = 1e-6


class RowSettings:
    """Sampling settings of persistent rows, on the host."""

    def __init__(self, max_num_rows: int) -> None:
        self.temperature = np.ones(max_num_rows, np.float32)  # [max_num_rows]
        self.top_k = np.zeros(max_num_rows, np.int64)  # [max_num_rows]
        self.top_p = np.ones(max_num_rows, np.float32)  # [max_num_rows]
        self.seed = np.zeros(max_num_rows, np.uint64)  # [max_num_rows]
        self.ras_window = np.zeros(max_num_rows, np.int64)  # [max_num_rows]
        self.ras_repeats = np.zeros(max_num_rows, np.int64)  # [max_num_rows]
        self.ras_blocks = np.zeros(max_num_rows, np.bool_)  # [max_num_rows], mode "block"

    @property
    def memory(self) -> SamplingMemory:
        """The settings themselves, for native code."""
        return SamplingMemory(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            ras_window=self.ras_window,
            ras_repeats=self.ras_repeats,
            ras_blocks=self.ras_blocks,
        )

    def set_row(self, row: int, params: SamplingParams, seed: int) -> None:
        """Settings of one row; ``seed`` is the one in use, ``params.seed`` may be None."""
        # logits over a smaller temperature leave float32; one code has all of the weight long before
        is_greedy = params.temperature < _MIN_TEMPERATURE
        self.temperature[row] = 0.0 if is_greedy else params.temperature
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.seed[row] = seed
        self.ras_window[row], self.ras_repeats[row] = params.ras_params
        self.ras_blocks[row] = params.ras_mode == "block"


@dataclass(frozen=True)
class SamplingMetadata:
    """Settings of the rows of one step, in step order, on the device."""

    rows: Tensor  # [num_rows] int64, persistent row of each
    seed: Tensor  # [num_rows] int64, bit pattern of the unsigned seed
    temperature: Temperature
    filters: TopKTopP | None
    ras_redraw: RasParams | None
    ras_block: RasParams | None

    @classmethod
    def of_rows(
        cls, rows: Sequence[int], settings: RowSettings, vocab_size: int, device: torch.device
    ) -> SamplingMetadata:
        """Gather the settings of ``rows``; ``vocab_size`` is that of one codebook."""
        idx = np.asarray(rows, np.int64)
        temperature = settings.temperature[idx]
        window, repeats = settings.ras_window[idx], settings.ras_repeats[idx]
        blocks = settings.ras_blocks[idx]
        return cls(
            rows=torch.from_numpy(idx).to(device),
            seed=torch.from_numpy(settings.seed[idx].view(np.int64)).to(device),
            temperature=Temperature.of(temperature, device),
            filters=top_k_top_p(
                settings.top_k[idx], settings.top_p[idx], temperature == 0, vocab_size, device
            ),
            ras_redraw=ras_params(window, repeats, ~blocks, device),
            ras_block=ras_params(window, repeats, blocks, device),
        )

    @property
    def history_width(self) -> int:
        """Past frames that the sampler needs to see; 0: none."""
        return max(p.max_window if p else 0 for p in (self.ras_redraw, self.ras_block))
