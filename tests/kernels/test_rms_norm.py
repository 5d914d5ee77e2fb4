"""The native norm against the reference, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.kernels import native, reference
from vllm.kernels.rms_norm import rms_norm

pytestmark = pytest.mark.skipif(
    native.loaded_library() is None, reason="the native library is not built"
)


@pytest.fixture(scope="module", params=native.supported_isas(), autouse=True)
def isa(request):
    before = native.isa()
    native.select_isa(request.param)
    yield
    native.select_isa(before)


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(0, 9),
    width=st.integers(1, 300),
    padding=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_equals_the_reference(num_rows, width, padding, seed):
    torch.manual_seed(seed)
    x = torch.randn(num_rows, width + padding)[:, :width] * 10.0 ** torch.randint(-3, 4, ())
    weight = torch.randn(width)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_is_alone_in_its_bits(num_threads):
    before = torch.get_num_threads()
    x, weight = torch.randn(64, 1000), torch.randn(1000)
    whole = rms_norm(x, weight, 1e-6)
    torch.set_num_threads(num_threads)
    try:
        for rows in (1, 2, 7, 33, 64):
            assert torch.equal(rms_norm(x[:rows], weight, 1e-6), whole[:rows])
    finally:
        torch.set_num_threads(before)


def test_what_lies_between_the_rows_is_not_read():
    held = torch.full((4, 40), float("nan"))
    held[:, 3:36] = torch.randn(4, 33)
    x, weight = held[:, 3:36], torch.ones(33)
    assert torch.isfinite(rms_norm(x, weight, 1e-5)).all()


def test_rows_of_zeros_stay_zeros():
    assert torch.equal(rms_norm(torch.zeros(2, 17), torch.ones(17), 1e-5), torch.zeros(2, 17))


def test_leading_axes_and_columns_in_steps():
    x, weight = torch.randn(2, 3, 20), torch.randn(10)
    steps = x[..., ::2]
    expected = reference.rms_norm(steps, weight, 1e-5)
    torch.testing.assert_close(rms_norm(steps, weight, 1e-5), expected)
