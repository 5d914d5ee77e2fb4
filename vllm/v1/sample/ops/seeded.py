"""Draws that depend on one uniform number each, so that a seed fixes them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw"]


def draw(weights: Tensor, noise: Tensor) -> Tensor:
    """Inverse of the cumulative distribution, taken in the order of the codes.

    Args:
        weights: float32 [num_rows, num_codebooks, vocab_size], not negative, any positive sum.
        noise: float32 [num_rows, num_codebooks] in [0, 1), as ``kernels.philox.uniform`` gives.

    Returns:
        int64 [num_rows, num_codebooks]; never a code of weight 0.
    """
    cumulative = weights.cumsum(-1)
    target = cumulative[..., -1:] * noise[..., None]
    codes = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return codes.clamp_(max=weights.shape[-1] - 1)  # weights that are not finite point past it
