"""The native gate against the reference, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.kernels import native, reference
from vllm.kernels.silu_mul import silu_mul

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library is not built")


@pytest.fixture(scope="module", params=native.supported_isas(), autouse=True)
def isa(request):
    before = native.isa()
    native.select_isa(request.param)
    yield
    native.select_isa(before)


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(0, 9),
    width=st.integers(1, 150),
    padding=st.integers(0, 5),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_equals_the_reference(num_rows, width, padding, scale, seed):
    torch.manual_seed(seed)
    held = torch.full((num_rows, 2 * width + padding), float("nan"))
    gate_up = held[:, : 2 * width]
    gate_up.copy_(torch.randn(num_rows, 2 * width) * scale)
    torch.testing.assert_close(silu_mul(gate_up), reference.silu_mul(gate_up))


def test_a_row_is_alone_in_its_bits():
    gate_up = torch.randn(40, 2 * 333)
    whole = silu_mul(gate_up)
    for rows in (1, 3, 39):
        assert torch.equal(silu_mul(gate_up[:rows]), whole[:rows])
