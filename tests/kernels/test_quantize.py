"""Quantised weights against the weights that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.kernels.quantize import WeightFormat, quantize, quantized_linear, weight_only_linear

QUANTIZED = [WeightFormat.INT8, WeightFormat.INT4, WeightFormat.FP8]


@settings(deadline=None, max_examples=40)
@given(
    num_outputs=st.integers(1, 40),
    num_groups=st.integers(1, 5),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 2**31),
)
def test_error_is_at_most_a_step(
    num_outputs: int, num_groups: int, exponent: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(num_outputs, 32 * num_groups) * 2.0**exponent
    int8 = quantize(weight, WeightFormat.INT8)
    error = (int8.dequantize() - weight).abs()
    assert (error <= int8.scales[:, None] * 0.51).all()
    int4 = quantize(weight, WeightFormat.INT4)
    steps = int4.scales.float().abs().repeat_interleave(32, 1)
    # Half a step inside, one step beyond the largest positive integer, and the scale's rounding.
    assert ((int4.dequantize() - weight).abs() <= steps * 1.05).all()


@pytest.mark.parametrize("weight_format", QUANTIZED)
def test_what_was_rounded_stays_as_it_is(weight_format: WeightFormat) -> None:
    once = quantize(torch.randn(200, 96), weight_format)
    twice = quantize(once.dequantize(), weight_format)
    assert torch.equal(twice.values, once.values)
    assert torch.equal(twice.scales, once.scales)


@pytest.mark.parametrize("weight_format", QUANTIZED)
def test_shape_is_that_of_the_weight(weight_format: WeightFormat) -> None:
    assert quantize(torch.randn(7, 64), weight_format).shape == (7, 64)


@pytest.mark.parametrize("weight_format", QUANTIZED)
def test_zeros_stay_zeros(weight_format: WeightFormat) -> None:
    quantized = quantize(torch.zeros(3, 64), weight_format)
    assert torch.equal(quantized.dequantize(), torch.zeros(3, 64))


def test_values_on_the_grid_are_kept() -> None:
    grid = torch.arange(-8, 8).float().repeat(3, 4) * 0.25
    assert torch.equal(quantize(grid, WeightFormat.INT4).dequantize(), grid)


def test_bfloat16_weights_are_taken() -> None:
    weight = torch.randn(4, 32, dtype=torch.bfloat16)
    expected = quantize(weight.float(), WeightFormat.INT8)
    assert torch.equal(quantize(weight, WeightFormat.INT8).values, expected.values)


def test_int4_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match="groups of 32, not 40"):
        quantize(torch.randn(2, 40), WeightFormat.INT4)


def test_fp8_is_off_by_one_part_in_sixteen_at_most() -> None:
    weight = torch.randn(50, 256) * 2.0 ** torch.randint(-6, 1, (50, 256))
    fp8 = quantize(weight, WeightFormat.FP8)
    assert fp8.values.dtype == torch.float8_e4m3fn
    error = (fp8.dequantize() - weight).abs()
    # Numbers below 2**-6 of a unit of the scale are fixed-point.
    assert (error <= weight.abs() / 16 * 1.01 + fp8.scales[:, None] * 2.0**-10).all()


@pytest.mark.parametrize(("weight_format", "limit"), [("int8", 0.01), ("fp8", 0.04)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_only_products_are_near_those_of_the_weight(
    weight_format: str, limit: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 256, dtype=dtype), torch.randn(50, 256)
    quantized = quantize(weight, WeightFormat(weight_format))
    actual = weight_only_linear(x, quantized)
    assert actual.dtype == dtype
    exact = x.float() @ weight.T
    assert (actual.float() - exact).norm() / exact.norm() < limit
    expected = x.double() @ quantized.dequantize().double().T
    assert (actual - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("weight_format", "limit"), [("int8", 0.02), ("int4", 0.15)])
def test_products_are_near_those_of_the_weight(weight_format: str, limit: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 256), torch.randn(50, 256)
    exact = x @ weight.T
    actual = quantized_linear(x, quantize(weight, WeightFormat(weight_format)))
    assert (actual - exact).norm() / exact.norm() < limit
