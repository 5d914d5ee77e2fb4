"""Native products against torch, in every format and on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm.kernels import native, reference
from vllm.kernels.packed_linear import PACKED_FORMATS, InputNorm, PackedMatrix
from vllm.kernels.quantize import QuantizedWeight, WeightFormat, quantize, quantize_rows
from vllm.kernels.rms_norm import rms_norm

pytestmark = pytest.mark.skipif(
    native.loaded_library() is None, reason="the native library is not built"
)

FORMATS = list(PACKED_FORMATS)
# Inputs become the same integers on both sides, so only the rounding of sums is left. Those of int8
# are integers, those of int4 too but for the scales of their groups.
TOLERANCE = {
    WeightFormat.FLOAT32: 1e-5,
    WeightFormat.BFLOAT16: 1e-5,
    WeightFormat.INT8: 1e-6,
    WeightFormat.INT4: 1e-6,
}
GATED_TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=native.supported_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = native.isa()
    assert before is not None
    native.select_isa(request.param)
    yield
    native.select_isa(before)


def in_format(weight: Tensor, weight_format: WeightFormat) -> Tensor | QuantizedWeight:
    if weight_format is WeightFormat.FLOAT32:
        return weight
    if weight_format is WeightFormat.BFLOAT16:
        return weight.bfloat16()
    return quantize(weight, weight_format)


def expected_product(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """The product of what inputs are rounded to, in float64."""
    if isinstance(weight, QuantizedWeight):
        rounded, scales = quantize_rows(x)
        return (rounded.double() @ weight.dequantize().double().T).mul_(scales).float()
    return (x.to(weight.dtype).double() @ weight.double().T).float()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().amax().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale + 1e-30)


shapes = st.fixed_dictionaries(
    {
        "weight_format": st.sampled_from(FORMATS),
        "num_rows": st.one_of(st.integers(0, 10), st.integers(11, 70)),
        "num_outputs": st.integers(1, 150),
        "num_inputs": st.one_of(st.integers(1, 140), st.just(1100)),
        "seed": st.integers(0, 2**31),
    }
)


def draw_operands(shape: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Rows between NaN, and a weight; int4 has whole groups of inputs."""
    torch.manual_seed(shape["seed"])
    num_inputs = shape["num_inputs"]
    if shape["weight_format"] is WeightFormat.INT4:
        num_inputs = -(-num_inputs // 32) * 32
    held = torch.full((shape["num_rows"], num_inputs + 3), float("nan"))
    held[:, 1:-2] = torch.randn(shape["num_rows"], num_inputs)
    return held[:, 1:-2], torch.randn(shape["num_outputs"], num_inputs)


@settings(deadline=None, max_examples=80)
@given(shape=shapes)
def test_equals_torch(shape: dict[str, int]) -> None:
    x, plain = draw_operands(shape)
    weight = in_format(plain, shape["weight_format"])
    actual = PackedMatrix(weight)(x)
    assert_close(actual, expected_product(x, weight), TOLERANCE[shape["weight_format"]])


@pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4])
def test_inputs_between_two_integers_are_rounded_as_in_torch(weight_format: WeightFormat) -> None:
    torch.manual_seed(0)
    num_inputs = 256
    largest = torch.rand(300, 1) + 0.1
    between = (torch.randint(-127, 127, (300, num_inputs)) + 0.5) * (largest / 127)
    x = torch.nextafter(between, between + torch.randint(-1, 2, between.shape))
    x[:, :1] = largest
    weight = in_format(torch.eye(num_inputs), weight_format)
    assert_close(PackedMatrix(weight)(x), expected_product(x, weight), TOLERANCE[weight_format])


@pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4])
def test_rows_of_next_to_nothing_give_numbers(weight_format: WeightFormat) -> None:
    weight = in_format(torch.randn(33, 64), weight_format)
    x = torch.full((2, 64), 1e-40)
    assert torch.equal(PackedMatrix(weight)(x), torch.zeros(2, 33))
    assert torch.equal(expected_product(x, weight), torch.zeros(2, 33))


@settings(deadline=None, max_examples=60)
@given(shape=shapes, num_threads=st.integers(1, 3), first=st.integers(0, 69))
def test_a_row_is_alone_in_its_bits(shape: dict[str, int], num_threads: int, first: int) -> None:
    x, plain = draw_operands(shape)
    matrix = PackedMatrix(in_format(plain, shape["weight_format"]))
    together = matrix(x)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for rows in {1, 2, 5, 9, len(x)}:
            part = slice(first % (len(x) or 1), first % (len(x) or 1) + rows)
            assert torch.equal(matrix(x[part]), together[part])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("num_rows", [1, 3, 30])
def test_threads_change_no_bit_where_all_take_part(
    weight_format: WeightFormat, num_rows: int
) -> None:
    matrix = PackedMatrix(in_format(torch.randn(700, 320), weight_format))
    x = torch.randn(num_rows, 320)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(matrix(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@settings(deadline=None, max_examples=40)
@given(shape=shapes)
def test_gated_norm_and_residual(shape: dict[str, int]) -> None:
    x, plain = draw_operands(shape)
    weight = in_format(torch.cat([plain, plain.flip(0)]), shape["weight_format"])
    norm = InputNorm(torch.rand(x.shape[1]) + 0.5, 1e-5)
    # The norm's own bits, since a last one more can round to another integer.
    normed = rms_norm(x, norm.weight, norm.eps)
    product = reference.silu_mul(expected_product(normed, weight))
    residual = torch.randn(product.shape)
    actual = PackedMatrix(weight, is_gated=True)(x, norm=norm, add_to=residual.clone())
    assert_close(actual, residual + product, GATED_TOLERANCE)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_columns_beside_the_result_stay_as_they_are(weight_format: WeightFormat) -> None:
    matrix = PackedMatrix(in_format(torch.randn(37, 64), weight_format))
    held = torch.full((3, 50), 7.0)
    matrix(torch.randn(3, 64), add_to=held[:, :37])
    assert torch.equal(held[:, 37:], torch.full((3, 13), 7.0))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_rows_of_zeros_give_zeros(weight_format: WeightFormat) -> None:
    matrix = PackedMatrix(in_format(torch.randn(33, 64), weight_format))
    assert torch.equal(matrix(torch.zeros(2, 64)), torch.zeros(2, 33))


@pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4])
def test_largest_products_do_not_saturate(weight_format: WeightFormat) -> None:
    weight = in_format(torch.full((17, 4096), -1.0), weight_format)
    for sign in (1.0, -1.0):
        actual = PackedMatrix(weight)(torch.full((2, 4096), sign))
        torch.testing.assert_close(actual, torch.full((2, 17), -4096 * sign))


@settings(deadline=None, max_examples=60)
@given(shape=shapes, is_gated=st.booleans(), num_threads=st.integers(1, 3))
def test_float32_numbers_that_are_bfloat16_change_no_bit(
    shape: dict[str, int], is_gated: bool, num_threads: int
) -> None:
    x, plain = draw_operands({**shape, "num_inputs": 2 * shape["num_inputs"]})
    short = plain.bfloat16().float()
    long = torch.cat([short, torch.full((1, short.shape[1]), 1 / 3)])  # is held as it is
    norm = InputNorm(torch.rand(x.shape[1]) + 0.5, 1e-5)
    if is_gated:
        short, long = torch.cat([short, short.flip(0)]), torch.cat([long, short.flip(0), long[-1:]])
    short, long = PackedMatrix(short, is_gated=is_gated), PackedMatrix(long, is_gated=is_gated)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(short(x), long(x)[:, :-1])
        assert torch.equal(short(x, norm=norm), long(x, norm=norm)[:, :-1])
    finally:
        torch.set_num_threads(before)


def test_bytes_of_a_product() -> None:
    weight = torch.randn(256, 512)
    num_bytes = {f: PackedMatrix(in_format(weight, f)).num_bytes for f in FORMATS}
    assert num_bytes[WeightFormat.FLOAT32] == 256 * 512 * 4
    assert num_bytes[WeightFormat.BFLOAT16] == 256 * 512 * 2
    assert PackedMatrix(weight.bfloat16().float()).num_bytes == 256 * 512 * 2
    assert num_bytes[WeightFormat.INT8] == 256 * (512 + 4 + 4)
    assert num_bytes[WeightFormat.INT4] == 256 * (512 // 2 + 512 // 32 * 2)
