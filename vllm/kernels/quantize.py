"""Weight matrices in few bits, and what a product with them is, in plain torch.

    int8   one float32 scale per output; weight = integer * scale, integers -127 .. 127
    int4   one bfloat16 scale per output and group of 32 inputs, integers -8 .. 7; two to a byte,
           the even input in the low half, plus 8
    fp8    one float32 scale per output; weight = e4m3 * scale, e4m3 up to 448

On the CPU, inputs of a product become int8 with one scale per row. On CUDA they stay as they are,
int4 is not there, and fp8 is nowhere else. Knows no layer and no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "INT4_GROUP_SIZE",
    "QuantizedWeight",
    "WeightFormat",
    "head_format",
    "quantize",
    "quantize_rows",
    "quantized_linear",
    "weight_only_linear",
]

INT4_GROUP_SIZE = 32  # inputs that share a scale
_LARGEST_INT8 = 127
_LARGEST_FP8 = 448
_SMALLEST_SCALE = 2.0**-100  # so that a row of zeros divides by something


class WeightFormat(StrEnum):
    """How a matrix is held."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


def head_format(body: WeightFormat | None) -> WeightFormat | None:
    """What the head of a model becomes whose other matrices become ``body``."""
    return WeightFormat.INT8 if body is WeightFormat.INT4 else body


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix [num_outputs, num_inputs] of int8, int4 or fp8."""

    format: WeightFormat
    # int8 or float8_e4m3fn [num_outputs, num_inputs], or uint8 [num_outputs, num_inputs / 2]
    values: Tensor
    scales: Tensor  # float32 [num_outputs] or bfloat16 [num_outputs, num_inputs / 32]

    def __post_init__(self) -> None:
        assert self.format in (WeightFormat.INT8, WeightFormat.INT4, WeightFormat.FP8)
        assert self.values.dim() == 2

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        rows, columns = self.values.shape
        return rows, columns * (2 if self.format is WeightFormat.INT4 else 1)

    def dequantize(self) -> Tensor:
        """The matrix that products are made with: float32 [num_outputs, num_inputs]."""
        if self.format is not WeightFormat.INT4:
            return self.values.float() * self.scales[:, None]
        grouped = _grouped(_unpack_nibbles(self.values).float())
        return (grouped * self.scales.float()[:, :, None]).flatten(1)


def quantize(weight: Tensor, weight_format: WeightFormat) -> QuantizedWeight:
    """``weight`` [num_outputs, num_inputs], of any floating type, rounded to int8, int4 or fp8.

    What was rounded once stays as it is: quantising the dequantised float32 gives it again.
    Inputs of int4 must be a multiple of 32; ``ValueError`` otherwise.
    """
    weight = weight.float()
    if weight_format is WeightFormat.INT8:
        scales = _output_scales(weight, _LARGEST_INT8)
        values = (weight / scales[:, None]).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)
        return QuantizedWeight(weight_format, values.to(torch.int8), scales)
    if weight_format is WeightFormat.FP8:
        scales = _output_scales(weight, _LARGEST_FP8)
        values = (weight / scales[:, None]).clamp_(-_LARGEST_FP8, _LARGEST_FP8)
        return QuantizedWeight(weight_format, values.to(torch.float8_e4m3fn), scales)
    if weight.shape[1] % INT4_GROUP_SIZE:
        raise ValueError(f"int4 needs inputs in groups of {INT4_GROUP_SIZE}, not {weight.shape[1]}")
    grouped = _grouped(weight)
    scales = _int4_scales(grouped)
    values = (grouped / scales.float()[:, :, None]).round_().clamp_(-8, 7).to(torch.int8)
    return QuantizedWeight(weight_format, _pack_nibbles(values.flatten(1)), scales)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``x`` [N, K] as integers -127 .. 127 in float32, and the scale of each: [N, 1].

    Operation by operation what native code does, so that both round every number to the same
    integer.
    """
    x = x.float()
    largest = x.abs().amax(1, keepdim=True).clamp_(min=127 * _SMALLEST_SCALE)
    # ``127 / largest`` is not a division: torch takes the reciprocal and multiplies, which rounds
    # twice.
    factors = torch.full_like(largest, 127.0) / largest
    return (x * factors).round_(), largest / 127


def quantized_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """``x`` [N, K] times the transpose of ``weight`` [M, K]: float32 [N, M].

    The definition of correct for the native product.
    """
    rounded, scales = quantize_rows(x)
    return F.linear(rounded, weight.dequantize()).mul_(scales)


def weight_only_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """``x`` [N, K] times the transpose of ``weight`` [M, K] of int8 or fp8: [N, M] like ``x``.

    Values of both formats are exact in every type of input, so scales are what is rounded.
    """
    assert weight.format is not WeightFormat.INT4
    product = F.linear(x, weight.values.to(x.dtype))
    return (product.float() * weight.scales).to(x.dtype)


def _output_scales(weight: Tensor, largest: int) -> Tensor:
    """Scales [M] of rows [M, K], with so few bits that ``largest`` times a scale is exact."""
    scales = (weight.abs().amax(1) / largest).clamp_(min=_SMALLEST_SCALE)
    mantissa, exponent = torch.frexp(scales)
    return torch.ldexp((mantissa * 2**16).round_(), exponent - 16)


def _grouped(weight: Tensor) -> Tensor:
    """Rows [M, K] as groups that share a scale: [M, K / 32, 32]."""
    return weight.reshape(len(weight), -1, INT4_GROUP_SIZE)


def _int4_scales(grouped: Tensor) -> Tensor:
    """Scales [M, groups] of groups [M, groups, 32]: the number of largest magnitude becomes -8."""
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True)).squeeze(2)
    scales = (largest / -8).to(torch.bfloat16)
    return torch.where(scales == 0, torch.full_like(scales, _SMALLEST_SCALE), scales)


def _pack_nibbles(values: Tensor) -> Tensor:
    low, high = (values + 8).to(torch.uint8).view(len(values), -1, 2).unbind(2)
    return low | high << 4


def _unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1).to(torch.int8) - 8
