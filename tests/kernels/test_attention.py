"""Paged attention against a dense reference, and its bits against changes of company."""

import pytest
import torch

from vllm.kernels import native
from vllm.kernels.attention import (
    DecodeMetadata,
    PrefillMetadata,
    PrefillSequence,
    paged_attention,
    plan_attention,
)
from vllm.kernels.cache import (
    allocate_kv_caches,
    cache_rows,
    clear_blocks,
    slots_of_positions,
    write_kv,
)

BLOCK = 16
HEAD_DIM = 16
SCALE = HEAD_DIM**-0.5


@pytest.fixture(params=["native", "torch"], autouse=True)
def form(request):
    if request.param == "torch":
        with native.disabled():
            yield
        return
    if native.loaded_library() is None:
        pytest.skip("the native library is not built")
    yield


def fill(cache, block_table, length, seed):
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(2, length, cache.shape[2], HEAD_DIM, generator=generator)
    block_size = cache.shape[3]
    clear_blocks([cache], block_table[: -(-length // block_size)].tolist())
    slots = slots_of_positions(block_table, torch.arange(length), block_size)
    write_kv(cache, cache_rows(slots, cache), torch.cat([kv[0], kv[1]], dim=1))
    return kv


def new_cache(num_blocks, num_kv_heads, block_size=BLOCK):
    (cache,) = allocate_kv_caches(
        1, num_blocks, block_size, num_kv_heads, HEAD_DIM, dtype=torch.float32
    )
    return cache.fill_(float("nan"))  # so that a read of a block nobody owns shows


def dense(query, kv, start):
    num_queries, num_heads, _ = query.shape
    keys, values = kv.repeat_interleave(num_heads // kv.shape[2], dim=2).double()
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * SCALE
    future = torch.arange(len(keys)) > (start + torch.arange(num_queries)).unsqueeze(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).float()


def decode(query, cache, tables, lens):
    metadata = DecodeMetadata.build(tables, lens, cache.shape[3])
    return paged_attention(query, cache, plan_attention(metadata, cache), SCALE)


def prefill(query, cache, table, start):
    rows = torch.arange(len(query))
    metadata = PrefillMetadata.build([PrefillSequence(rows, table, start, len(rows))], BLOCK)
    return paged_attention(query, cache, plan_attention(metadata, cache), SCALE)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (6, 2), (2, 2)])
def test_decode_equals_dense_and_its_solo_run(num_heads, num_kv_heads):
    lens = [1, 63, 64, 65, 200, 7, 128]
    cache = new_cache(7 * 13, num_kv_heads)
    tables = torch.randperm(7 * 13).view(7, 13)
    kvs = [fill(cache, tables[i], length, i) for i, length in enumerate(lens)]
    query = torch.randn(7, num_heads, HEAD_DIM)
    together = decode(query, cache, tables, lens)
    for i, length in enumerate(lens):
        torch.testing.assert_close(together[i : i + 1], dense(query[i : i + 1], kvs[i], length - 1))
        blocks = -(-length // BLOCK)
        alone = decode(query[i : i + 1], cache, tables[i : i + 1, :blocks], [length])
        assert torch.equal(alone[0], together[i])


def test_a_far_longer_neighbour_changes_no_bit():
    lens = [65, 130, 200, 500, 2100]
    cache = new_cache(5 * 132, 2)
    tables = torch.randperm(5 * 132).view(5, 132)
    for i, length in enumerate(lens):
        fill(cache, tables[i], length, i)
    query = torch.randn(5, 8, HEAD_DIM)
    together = decode(query, cache, tables, lens)
    for i, length in enumerate(lens):
        alone = decode(query[i : i + 1], cache, tables[i : i + 1], [length])
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("block_size", [8, 32, 128])
def test_decode_gives_the_same_bits_at_any_block_size(block_size):
    lens = [1, 64, 70, 200]
    query = torch.randn(4, 6, HEAD_DIM)

    def run(block_size):
        cache = new_cache(4 * 256 // block_size, 2, block_size)
        tables = torch.randperm(4 * 256 // block_size).view(4, -1)
        for i, length in enumerate(lens):
            fill(cache, tables[i], length, i)
        return decode(query, cache, tables, lens)

    assert torch.equal(run(block_size), run(BLOCK))


@pytest.mark.parametrize("length", [1, 30, 64, 150])
def test_prefill_equals_dense(length):
    cache = new_cache(10, 2)
    table = torch.randperm(10)
    kv = fill(cache, table, length, 0)
    query = torch.randn(length, 6, HEAD_DIM)
    torch.testing.assert_close(prefill(query, cache, table, 0), dense(query, kv, 0))


@pytest.mark.parametrize("cut", [1, 16, 37, 64, 149])
def test_prefill_in_two_chunks_has_the_bits_of_one(cut):
    cache = new_cache(10, 2)
    table = torch.randperm(10)
    fill(cache, table, 150, 0)
    query = torch.randn(150, 4, HEAD_DIM)
    whole = prefill(query, cache, table, 0)
    parts = [prefill(query[:cut], cache, table, 0), prefill(query[cut:], cache, table, cut)]
    assert torch.equal(torch.cat(parts), whole)


def test_rows_beyond_the_plan_come_back_as_zeros():
    cache = new_cache(2, 2)
    table = torch.tensor([[1]])
    fill(cache, table[0], 5, 0)
    output = decode(torch.randn(4, 4, HEAD_DIM), cache, table, [5])
    assert output.shape[0] == 4
    assert output[0].abs().sum() > 0
    assert not output[1:].any()
