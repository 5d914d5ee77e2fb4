"""The Muon optimizer (Jordan et al., 2024): momentum whose matrices are made orthogonal.

Every direction of a weight matrix moves equally far in a step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Muon"]

_QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of the Newton-Schulz step
_NUM_STEPS = 5


class Muon(Optimizer):
    """For the matrices inside a network; embeddings, heads and gains need another optimizer.

    A convolution's weight is the matrix of its outputs and everything that they see.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``dtype``: of the iteration; bfloat16 is slow on processors without its products."""
        self._dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                moments = [self._momentum(each, group["momentum"]) for each in weights]
                updates = torch.stack(moments).flatten(2)
                scale = max(1.0, shape[0] / updates.shape[2]) ** 0.5
                steps = _orthogonal(updates.to(self._dtype))
                for weight, update in zip(weights, steps, strict=True):
                    weight.add_(update.view(shape), alpha=-group["lr"] * scale)

    def _momentum(self, weight: Tensor, decay: float) -> Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(weight.grad, 1 - decay)
        return weight.grad.lerp(momentum, decay)


def _orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [N, rows, columns] with singular values near 1."""
    a, b, c = _QUINTIC
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if is_tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(_NUM_STEPS):
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return x.transpose(1, 2) if is_tall else x
