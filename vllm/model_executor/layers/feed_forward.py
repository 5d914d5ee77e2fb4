"""Gated feed-forward block: ``down(silu(gate x) * up x)``.

Gate and up are one product; which rows a block sees is the caller's to say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm.model_executor.layers.layer import Layer
from vllm.model_executor.layers.linear import GatedLinear, Linear

__all__ = ["FeedForward"]


class FeedForward(Layer):
    """SwiGLU block of width ``intermediate_size``."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up = GatedLinear(hidden_size, parts, dtype)
        self.down = Linear(intermediate_size, hidden_size, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[N, hidden_size] -> [N, hidden_size]."""
        output: Tensor = self.down(self.gate_up(x))
        return output

    def targets(self, prefix: str) -> dict[str, Tensor]:
        return self.gate_up.targets(prefix) | self.down.targets(f"{prefix}.down_proj")
