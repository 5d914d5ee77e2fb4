"""Rotary position tables, with Llama 3's scaling of slow frequencies.

Computes tables only; the rotation itself is ``kernels.reference.apply_rope``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm.checkpoint_config import RopeScaling
from vllm.model_executor.layers.layer import Layer

__all__ = ["RotaryTable", "inverse_frequencies"]


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each pair of dimensions, float32 [head_dim / 2].

    With scaling, wavelengths shorter than ``original / high_freq_factor`` stay, longer than
    ``original / low_freq_factor`` are stretched by ``factor``, and those between are blended, as
    Llama 3 does it.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    plain = 1.0 / theta**exponents
    if scaling is None:
        return plain
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / plain
    keep = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * plain / scaling.factor + keep * plain


class RotaryTable(Layer):
    """Cosines and signed sines of positions 0 .. num_positions - 1."""

    cos: Tensor  # [num_positions, 1, head_dim]
    signed_sin: Tensor  # [num_positions, 1, head_dim]

    def __init__(
        self,
        head_dim: int,
        num_positions: int,
        theta: float,
        scaling: RopeScaling | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        frequencies = inverse_frequencies(head_dim, theta, scaling)
        angles = torch.outer(torch.arange(num_positions, device="cpu").float(), frequencies)
        cos, sin = angles.cos(), angles.sin()
        device = torch.get_default_device()
        cosines = torch.cat([cos, cos], dim=-1).unsqueeze(1).to(device, dtype)
        signed_sines = torch.cat([-sin, sin], dim=-1).unsqueeze(1).to(device, dtype)
        self.register_buffer("cos", cosines, persistent=False)
        self.register_buffer("signed_sin", signed_sines, persistent=False)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of all positions."""
        return self.cos, self.signed_sin

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [N] -> cosines and signed sines, each [N, 1, head_dim]."""
        return self.cos.index_select(0, positions), self.signed_sin.index_select(0, positions)
