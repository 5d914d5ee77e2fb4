"""Linear maps without bias, alone or several side by side in one matrix.

Owns the weights, and chooses once they are loaded who multiplies by them: the native library or
torch, or on CUDA a kernel of decode steps. How either makes a row's result independent of the batch
is ``kernels``' business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from vllm.kernels import native
from vllm.kernels.linear import DEFAULT_ROW_QUANTUM, linear, pack_weight
from vllm.kernels.packed_linear import PackedMatrix
from vllm.kernels.quantize import (
    QuantizedWeight,
    WeightFormat,
    quantize,
    quantize_rows,
    weight_only_linear,
)
from vllm.kernels.reference import silu_mul
from vllm.model_executor.layers.layer import Layer

__all__ = ["GatedLinear", "Linear", "PackedLinear"]

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


class Linear(Layer):
    """``y = x W^T`` with ``W`` [out_features, in_features].

    ``row_quantum`` is that of the model, see ``SpeechModel.set_row_quantum``.
    """

    row_quantum = DEFAULT_ROW_QUANTUM
    is_gated = False

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = (out_features, in_features)
        # Stored input-major: the same bits, and a product of few rows reads it a fifth faster.
        weight = torch.empty(in_features, out_features, dtype=dtype).t()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._native: PackedMatrix | None = None
        # What torch multiplies as float32, though weights and inputs are rounded to less.
        self._rounded_to: WeightFormat | None = None
        # What products take with inputs as they are.
        self._weight_only: QuantizedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_features] -> [N, out_features]."""
        if self._native is not None:
            return self._native(x).to(x.dtype)
        return self._multiply(x)

    def pack(self, quantization: WeightFormat | None = None) -> None:
        """Bring the loaded weight into the form of its products; nothing is loaded after it.

        Args:
            quantization: int8 or int4 for a float32 weight on the CPU, int8 or fp8 for any on
                CUDA; None leaves its values. Of bfloat16 on the CPU, inputs are rounded too, and
                sums stay float32.

        Raises:
            ValueError: the weight does not fit the format.
        """
        weight = self.weight.detach()
        quantized = None if quantization is None else quantize(weight, quantization)
        is_cpu = weight.device.type == "cpu"
        if quantized is not None and (quantized.format is WeightFormat.FP8 or not is_cpu):
            self._weight_only = replace(quantized, values=quantized.values.contiguous())
            weight = weight.new_empty(0)
        elif is_cpu and weight.dtype in _NATIVE_DTYPES and native.loaded_library() is not None:
            form = weight if quantized is None else quantized
            self._native = PackedMatrix(form, is_gated=self.is_gated)
            weight = weight.new_empty(0)
        else:
            if quantized is not None:
                self._rounded_to, weight = quantization, quantized.dequantize()
            elif is_cpu and weight.dtype == torch.bfloat16:
                self._rounded_to, weight = WeightFormat.BFLOAT16, weight.float()
            weight = pack_weight(weight)
        self.weight = nn.Parameter(weight, requires_grad=False)

    @property
    def uses_torch(self) -> bool:
        """Whether products are torch's; ``weight`` holds nothing otherwise, once it is packed."""
        return self._native is None

    def native_matrix(self) -> PackedMatrix:
        """The weight, for native steps; only where ``uses_torch`` is false."""
        assert self._native is not None
        return self._native

    def skinny_weight(self) -> Tensor | QuantizedWeight:
        """The weight for ``kernels.skinny_linear``, contiguous; only where ``uses_torch`` is true."""
        assert self._native is None
        return self.weight.contiguous() if self._weight_only is None else self._weight_only

    def _multiply(self, x: Tensor) -> Tensor:
        if self._weight_only is not None:
            return weight_only_linear(x, self._weight_only)
        if self._rounded_to is None:
            return linear(x, self.weight, self.row_quantum)
        if self._rounded_to is WeightFormat.BFLOAT16:
            return linear(x.bfloat16().float(), self.weight, self.row_quantum)
        rounded, scales = quantize_rows(x)
        return linear(rounded, self.weight, self.row_quantum).mul_(scales)

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


class GatedLinear(PackedLinear):
    """A gate and a map as wide side by side: ``silu(gate x) * up x``.

    Args:
        in_features: width of the input.
        parts: checkpoint names of gate and map -> the width of each.
    """

    is_gated = True

    def _multiply(self, x: Tensor) -> Tensor:
        return silu_mul(super()._multiply(x))
