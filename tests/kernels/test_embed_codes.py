"""The native sum of codebook rows against torch, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.kernels import native
from vllm.kernels.embed_codes import embed_codes

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
    num_codebooks=st.integers(1, 9),
    codebook_size=st.integers(1, 7),
    width=st.integers(1, 80),
    padding=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_equals_torch(num_rows, num_codebooks, codebook_size, width, padding, seed):
    torch.manual_seed(seed)
    table = torch.randn(num_codebooks * codebook_size, width)
    held = torch.full((num_rows, num_codebooks + padding), 10**9)
    codes = held[:, :num_codebooks]
    offsets = torch.arange(num_codebooks) * codebook_size
    codes.copy_(torch.randint(codebook_size, (num_rows, num_codebooks)))
    y = embed_codes(codes, table, offsets)
    with native.disabled():
        expected = embed_codes(codes, table, offsets)
    torch.testing.assert_close(y, expected)
    for row in range(num_rows):
        assert torch.equal(embed_codes(codes[row : row + 1], table, offsets), y[row : row + 1])
