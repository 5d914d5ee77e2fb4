"""Attention of new positions over pages: the Triton kernel against torch, and its bits.

What no row may read, blocks of nobody and positions not yet written, is NaN.
"""

from __future__ import annotations

import pytest
import torch

from vllm.kernels import reference
from vllm.kernels.triton import decode_attention
from vllm.kernels.triton.decode_attention import rope_write_attend
from vllm.kernels.triton.offline import ARCHITECTURES

BLOCK_SIZE = 16
HEAD_DIM = 32


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch):
    """Several splits of several tiles without long contexts."""
    monkeypatch.setattr(decode_attention, "SPLIT", 64)
    monkeypatch.setattr(decode_attention, "_tile", lambda dtype: 32)


class Rows:
    """Sequences of given lengths on scattered pages, each with a new position in ``qkv``."""

    def __init__(self, lengths, *, dtype, cache_dtype=None, num_heads=6, num_kv_heads=2):
        self.num_heads = num_heads
        self.positions = torch.tensor(lengths)
        self.tables = torch.randperm(len(lengths))
        counts = [length // BLOCK_SIZE + 1 for length in lengths]
        order = torch.randperm(sum(counts) + 2)
        unowned = int(order[-1])
        self.block_tables = torch.full((len(lengths), max(counts) + 1), unowned)
        shape = (2, len(order), num_kv_heads, BLOCK_SIZE, HEAD_DIM)
        cache = torch.full(shape, float("nan"))
        for table, length, count in zip(self.tables, lengths, counts, strict=True):
            blocks, order = order[:count], order[count:]
            self.block_tables[table, :count] = blocks
            for position in range(length):
                block = blocks[position // BLOCK_SIZE]
                cache[:, block, :, position % BLOCK_SIZE] = torch.randn(2, num_kv_heads, HEAD_DIM)
        self.cache = cache.to(cache_dtype or dtype)
        heads = num_heads + 2 * num_kv_heads
        self.qkv = (torch.randn(len(lengths), heads * HEAD_DIM) * 2).to(dtype)
        angles = torch.randn(max(lengths) + 1, 1, HEAD_DIM // 2)
        self.cos = torch.cat([angles.cos()] * 2, -1).to(dtype)
        self.signed_sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)

    def expected(self):
        """Context [N, num_heads * HEAD_DIM] and cache by the reference."""
        cache = self.cache.clone()
        context = reference.rope_write_attend(
            *(self.qkv, self.cos, self.signed_sin, cache),
            *(self.block_tables, self.tables, self.positions, self.num_heads, HEAD_DIM**-0.5),
        )
        return context, cache

    def attend(self, device, rows=slice(None), **options):
        """Context of some rows, and the cache after it."""
        cache = self.cache.to(device, copy=True)
        context = rope_write_attend(
            *(self.qkv[rows].to(device), self.cos.to(device), self.signed_sin.to(device), cache),
            *(self.block_tables.to(device), self.tables[rows].to(device)),
            *(self.positions[rows].to(device), self.num_heads, HEAD_DIM**-0.5),
            **options,
        )
        return context.cpu(), cache.cpu()


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "tolerance"),
    [
        (torch.float32, None, 2e-5),
        (torch.float16, None, 4e-3),
        (torch.bfloat16, None, 3e-2),
        (torch.bfloat16, torch.float8_e4m3fn, 6e-2),
    ],
)
def test_equals_the_reference(device, grid_order, dtype, cache_dtype, tolerance):
    torch.manual_seed(1)
    # Positions around the ends of tiles, splits and blocks; the first has nothing before it.
    rows = Rows([0, 1, 31, 64, 65, 63, 150, 192], dtype=dtype, cache_dtype=cache_dtype)
    expected, expected_cache = rows.expected()
    context, cache = rows.attend(device)
    torch.testing.assert_close(context, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        cache.float(), expected_cache.float(), atol=1e-2, rtol=0.13, equal_nan=True
    )


@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (3, 1)])
def test_equals_the_reference_for_groups_of_any_size(device, heads):
    rows = Rows([70, 3], dtype=torch.float32, num_heads=heads[0], num_kv_heads=heads[1])
    context, _ = rows.attend(device)
    torch.testing.assert_close(context, rows.expected()[0], atol=2e-5, rtol=2e-5)


def test_a_row_has_the_bits_that_it_has_alone(device, grid_order):
    rows = Rows([130, 1, 64, 200, 70], dtype=torch.float16)
    together, _ = rows.attend(device)
    for row in range(5):
        alone, _ = rows.attend(device, slice(row, row + 1))
        assert torch.equal(alone[0], together[row])


def test_counters_serve_again_and_more_splits_than_there_are_change_no_bit(device):
    rows = Rows([130, 20], dtype=torch.float16)
    arrivals = torch.zeros(8, dtype=torch.int32, device=device)
    first, _ = rows.attend(device)
    for max_context_len in (1024, 192):
        again, _ = rows.attend(device, arrivals=arrivals, max_context_len=max_context_len)
        assert torch.equal(again, first)
    assert not arrivals.any()


def test_padding_reads_and_writes_nothing(device):
    rows = Rows([5, 9], dtype=torch.float32)
    rows.positions[1] = -1
    rows.tables[1] = 10**6
    before = rows.cache.clone()
    _, cache = rows.attend(device)
    written = cache.nan_to_num(7) != before.nan_to_num(7)
    block = rows.block_tables[rows.tables[0], 0]
    assert written.any(-1).nonzero()[:, [1, 3]].unique(dim=0).tolist() == [[int(block), 5]]


MODEL = {"NUM_HEADS": 24, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK_SIZE": 32, "ROWS": 16}


def _compile(compile_offline, arch, dtype, cache_dtype, *, pdl=False):
    model = ("qkv_ptr", "cos_ptr", "signed_sin_ptr", "context_ptr")
    return compile_offline(
        "vllm.kernels.triton.decode_attention:decode_attention_kernel",
        {
            **dict.fromkeys(model, f"*{dtype}"),
            "cache_ptr": f"*{cache_dtype}",
            **dict.fromkeys(("block_tables_ptr", "tables_ptr", "positions_ptr"), "*i64"),
            **dict.fromkeys(("partials_ptr", "statistics_ptr"), "*fp32"),
            "arrivals_ptr": "*i32",
            "scale": "fp32",
            "value_offset": "i64:16",
            "block_table_stride": "i64",
        },
        MODEL | {"SPLIT": 256, "TILE": 32 if dtype == "fp32" else 64, "PDL": pdl},
        arch,
        num_warps=4,
        num_stages=5,
        launch_pdl=pdl,
    )


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_with_pipelined_loads_and_tensor_cores(compile_offline, arch):
    assert _compile(compile_offline, arch, "bf16", "bf16").faults(contains=("LDGSTS", "HMMA")) == []


def test_compiles_to_wait_for_the_kernel_before(compile_offline):
    compiled = _compile(compile_offline, 90, "bf16", "fp8e4nv", pdl=True)
    assert compiled.faults(contains=("LDGSTS", "HMMA")) == []
    assert compiled.waits_first()
    assert "griddepcontrol.launch_dependents" in compiled.ptx


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8e4nv"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_number_type(compile_offline, arch, dtype):
    if dtype == "fp8e4nv" and arch == 80:
        pytest.skip("the card has no such numbers")
    model = "bf16" if dtype == "fp8e4nv" else dtype
    contains = ("LDGSTS",) if dtype == "fp32" else ("LDGSTS", "HMMA")
    assert _compile(compile_offline, arch, model, dtype).faults(contains=contains) == []
