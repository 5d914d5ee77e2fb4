"""The corrected interpreter: what Triton's own gets wrong, and kernels therefore could not show."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")


@triton.jit
def _cast(source, target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def _multiply(x, y, product, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(product + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def _add(x, y, total):
    tl.store(total, tl.load(x) + tl.load(y))


@triton.jit
def _count(length, steps):
    taken = 0
    for _ in range(0, tl.load(length)):
        taken += 1
    tl.store(steps, taken)


@triton.jit
def _arrive(counter, arrivals):
    tl.store(arrivals + tl.program_id(0), tl.atomic_add(counter, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_casts_round_to_nearest_even_and_come_back(dtype: torch.dtype) -> None:
    exponents = torch.linspace(-12, 8, 512)
    source = torch.randn(512) * 2**exponents
    target = torch.empty(512, dtype=dtype)

    _cast[(1,)](source, target, SIZE=512)

    assert torch.equal(target.float(), source.to(dtype).float())
    back = torch.empty(512)
    _cast[(1,)](target, back, SIZE=512)
    assert torch.equal(back, target.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_integers_become_floats(dtype: torch.dtype) -> None:
    source = torch.arange(-128, 128, dtype=torch.int8)
    target = torch.empty(256, dtype=dtype)
    _cast[(1,)](source, target, SIZE=256)
    assert target.tolist() == source.tolist()


def test_casts_to_eight_bits_saturate() -> None:
    target = torch.empty(2, dtype=torch.float8_e4m3fn)
    _cast[(1,)](torch.tensor([1e4, -1e4]), target, SIZE=2)
    assert target.tolist() == [448.0, -448.0]


def test_products_of_bfloat16_are_summed_in_float32() -> None:
    x, y = torch.randn(2, 16, 16).bfloat16()
    product = torch.empty(16, 16)
    _multiply[(1,)](x, y, product, SIZE=16)
    torch.testing.assert_close(product, x.float() @ y.float())


def test_arithmetic_on_bfloat16_is_refused() -> None:
    x = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="make it float32 first"):
        _add[(1,)](x, x, x.clone())


def test_loops_may_end_at_a_tensor() -> None:
    steps = torch.zeros(1, dtype=torch.int32)
    _count[(1,)](torch.tensor([5], dtype=torch.int32), steps)
    assert steps.item() == 5


def test_programs_run_in_the_wanted_order(grid_order: str) -> None:
    arrivals = torch.zeros(3, dtype=torch.int32)
    _arrive[(3,)](torch.zeros(1, dtype=torch.int32), arrivals)
    assert arrivals.tolist() == ([0, 1, 2] if grid_order == "in order" else [2, 1, 0])
