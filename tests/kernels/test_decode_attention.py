"""Native attention over pages against a dense float64 one, on every instruction set here.

What no row may see, blocks of nobody and positions beyond a sequence's end, is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm.kernels import native
from vllm.kernels.decode_attention import attend_rows, rope_write_attend
from vllm.kernels.reference import apply_rope

pytestmark = pytest.mark.skipif(
    native.loaded_library() is None, reason="the native library is not built"
)


@pytest.fixture(scope="module", params=native.supported_isas(), autouse=True)
def isa(request):
    before = native.isa()
    native.select_isa(request.param)
    yield
    native.select_isa(before)


@dataclass
class Pages:
    """Sequences of given lengths on scattered pages, and their keys and values as they are."""

    cache: Tensor  # [2, num_blocks, num_kv_heads, block_size, head_dim]
    block_tables: Tensor  # int64 [num_sequences, max_blocks]
    keys_values: list[Tensor]  # per sequence [2, num_kv_heads, length, head_dim]

    @classmethod
    def fill(
        cls,
        lengths,
        *,
        num_kv_heads,
        head_dim,
        block_size,
        heads_outside=True,
        dtype=torch.float32,
    ):
        counts = [-(-length // block_size) for length in lengths]
        num_blocks = sum(counts) + 3
        order = torch.randperm(num_blocks)
        tables = torch.full((len(lengths), max(counts) + 2), int(order[-1]))
        inner = (num_kv_heads, block_size) if heads_outside else (block_size, num_kv_heads)
        # Rows wider than a head, so that no stride is a product of sizes.
        cache = torch.full((2, num_blocks, *inner, head_dim + 16), float("nan"), dtype=dtype)
        cache = cache[..., :head_dim]
        cache = cache if heads_outside else cache.transpose(2, 3)
        keys_values = []
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            blocks, order = order[:count], order[count:]
            tables[row, :count] = blocks
            each = torch.randn(2, num_kv_heads, length, head_dim).to(dtype)
            for position in range(length):
                block, offset = blocks[position // block_size], position % block_size
                cache[:, block, :, offset] = each[:, :, position]
            keys_values.append(each)
        return cls(cache, tables, keys_values)


def dense(query, keys_values, scale):
    """[num_heads, head_dim] over keys and values [2, num_kv_heads, length, head_dim]."""
    keys, values = keys_values.double()
    grouped = query.double().view(keys.shape[0], -1, query.shape[-1])
    weights = (scale * grouped @ keys.transpose(1, 2)).softmax(-1)
    return (weights @ values).view(query.shape).float()


shapes = {
    "num_kv_heads": st.integers(1, 3),
    "group": st.sampled_from([1, 2, 3, 4]),
    "head_dim": st.sampled_from([16, 32, 64, 80, 128]),
    "block_size": st.sampled_from([1, 3, 16, 100]),
    "heads_outside": st.booleans(),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "seed": st.integers(0, 99),
}


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4), **shapes)
def test_rows_of_a_prefill(
    lengths, num_kv_heads, group, head_dim, block_size, heads_outside, dtype, seed
):
    torch.manual_seed(seed)
    pages = Pages.fill(
        lengths,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        heads_outside=heads_outside,
        dtype=dtype,
    )
    tables = torch.randint(len(lengths), (7,))
    positions = torch.stack([torch.randint(lengths[table], ()) for table in tables.tolist()])
    query = torch.randn(7, num_kv_heads * group, head_dim) * 3
    context = attend_rows(query, pages.cache, pages.block_tables, tables, positions, 0.3)
    for row, (table, position) in enumerate(zip(tables.tolist(), positions.tolist(), strict=True)):
        seen = pages.keys_values[table][:, :, : position + 1]
        torch.testing.assert_close(context[row], dense(query[row], seen, 0.3), atol=2e-5, rtol=2e-5)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4), **shapes)
def test_new_positions_are_rotated_and_written(
    lengths, num_kv_heads, group, head_dim, block_size, heads_outside, dtype, seed
):
    torch.manual_seed(seed)
    pages = Pages.fill(
        lengths,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        heads_outside=heads_outside,
        dtype=dtype,
    )
    num_rows, num_heads = len(lengths), num_kv_heads * group
    positions = torch.tensor(lengths) - 1
    order = torch.randperm(num_rows)
    angles = torch.randn(max(lengths), 1, head_dim // 2)
    cos = torch.cat([angles.cos()] * 2, -1)
    signed_sin = torch.cat([-angles.sin(), angles.sin()], -1)
    for row, (table, length) in enumerate(zip(pages.block_tables, lengths, strict=True)):
        block, offset = table[(length - 1) // block_size], (length - 1) % block_size
        pages.cache[:, block, :, offset] = float("nan")
        assert pages.keys_values[row].shape[2] == length
    qkv = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim)
    heads = qkv.clone().view(num_rows, -1, head_dim)
    rotated = apply_rope(
        heads[:, : num_heads + num_kv_heads],
        cos[positions[order]],
        signed_sin[positions[order]],
    )
    context = rope_write_attend(
        qkv,
        *(cos, signed_sin, pages.cache, pages.block_tables),
        *(order, positions[order].contiguous(), num_heads, head_dim**-0.5),
    )
    for row, table in enumerate(order.tolist()):
        length, seen = lengths[table], pages.keys_values[table]
        new = torch.stack([rotated[row, num_heads:], heads[row, num_heads + num_kv_heads :]])
        block, offset = pages.block_tables[table, (length - 1) // block_size], length - 1
        written = pages.cache[:, block, :, offset % block_size]
        # A rotation that ends elsewhere in its last bit may be rounded to the other neighbour.
        rounding = {"rtol": 2**-7, "atol": 1e-5} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(written.float(), new, **rounding)
        seen[:, :, -1] = written
        expected = dense(rotated[row, :num_heads], seen, head_dim**-0.5)
        torch.testing.assert_close(
            context[row].view(expected.shape), expected, atol=2e-5, rtol=2e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_is_alone_in_its_bits(num_threads, dtype):
    torch.manual_seed(1)
    lengths = [200, 1, 64, 65, 130]
    pages = Pages.fill(lengths, num_kv_heads=2, head_dim=32, block_size=16, dtype=dtype)
    query, tables = torch.randn(5, 6, 32), torch.arange(5)
    positions = torch.tensor(lengths) - 1
    whole = attend_rows(query, pages.cache, pages.block_tables, tables, positions, 0.2)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for row in range(5):
            alone = attend_rows(
                *(query[row : row + 1], pages.cache, pages.block_tables),
                *(tables[row : row + 1], positions[row : row + 1], 0.2),
            )
            assert torch.equal(alone[0], whole[row])
    finally:
        torch.set_num_threads(before)
    assert torch.isfinite(whole).all()
