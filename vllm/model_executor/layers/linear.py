"""Linear maps without bias, alone or several side by side in one matrix.

Owns the weights; how the product is made invariant to the batch is ``kernels.linear``'s.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vllm.kernels.linear import DEFAULT_ROW_QUANTUM, linear, pack_weight
from vllm.kernels.packed_linear import PackedMatrix
from vllm.model_executor.layers.layer import Layer

__all__ = ["Linear", "PackedLinear"]


class Linear(Layer):
    """``y = x W^T`` with ``W`` [out_features, in_features].

    ``row_quantum`` is that of the model, see ``SpeechModel.set_row_quantum``.
    """

    row_quantum = DEFAULT_ROW_QUANTUM

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        # Stored input-major: the same bits, and a product of few rows reads it a fifth faster.
        weight = torch.empty(in_features, out_features, dtype=dtype).t()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_features] -> [N, out_features]."""
        return linear(x, self.weight, self.row_quantum)

    def pack(self) -> None:
        """Bring the loaded weight into the form of its products; nothing is loaded after it."""
        self.weight = nn.Parameter(pack_weight(self.weight), requires_grad=False)

    def native_matrix(self, *, is_gated: bool = False) -> PackedMatrix:
        """A copy of the weight for native steps; see ``PackedMatrix``."""
        weight = self.weight.detach()
        return PackedMatrix(weight.to_dense() if weight.is_mkldnn else weight, is_gated=is_gated)

    def targets(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}.weight": self.weight}


class PackedLinear(Linear):
    """Several linear maps of one input as one product, outputs side by side.

    Args:
        in_features: width of the input.
        parts: checkpoint name of each map -> its output width, in output order.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], dtype: torch.dtype) -> None:
        super().__init__(in_features, sum(parts.values()), dtype)
        self._parts = dict(parts)

    def targets(self, prefix: str) -> dict[str, Tensor]:
        """Names below ``prefix``, the module that holds the maps in the checkpoint."""
        views = torch.split(self.weight, list(self._parts.values()))
        return {
            f"{prefix}.{name}.weight": view for name, view in zip(self._parts, views, strict=True)
        }
