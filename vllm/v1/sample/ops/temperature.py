"""Temperature: how far the distribution is flattened, and which rows take the likeliest code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Temperature", "apply_temperature"]


@dataclass(frozen=True)
class Temperature:
    """Temperatures of one step."""

    all_greedy: bool  # every row takes the likeliest code, nothing is drawn
    divisor: Tensor | None  # [num_rows, 1, 1] float32, 1 for greedy rows; None: all 1
    is_greedy: Tensor | None  # [num_rows, 1] bool; None: no row, or every row

    @classmethod
    def of(cls, temperature: NDArray[np.float32], device: torch.device) -> Temperature:
        """From the temperature of each row [num_rows]; 0 is greedy."""
        greedy = temperature == 0
        divisor = np.where(greedy, np.float32(1), temperature)
        is_mixed = bool(greedy.any()) and not greedy.all()
        return cls(
            all_greedy=bool(greedy.all()),
            divisor=(
                torch.from_numpy(divisor).to(device)[:, None, None]
                if (divisor != 1).any()
                else None
            ),
            is_greedy=_column(greedy, device) if is_mixed else None,
        )


def apply_temperature(logits: Tensor, temperature: Temperature) -> Tensor:
    """Logits [num_rows, num_codebooks, vocab_size] over the temperature of their row."""
    return logits if temperature.divisor is None else logits / temperature.divisor


def _column(values: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)[:, None]
