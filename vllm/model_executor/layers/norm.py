"""Root-mean-square norm with a learned gain.

Owns the gain; the arithmetic is ``kernels.rms_norm``'s.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm.kernels.rms_norm import rms_norm
from vllm.model_executor.layers.layer import Layer

__all__ = ["RMSNorm"]


class RMSNorm(Layer):
    """Norm over the last dimension of width ``size``."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[N, size] -> [N, size]."""
        return rms_norm(x, self.weight, self._eps)

    def targets(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}.weight": self.weight}
