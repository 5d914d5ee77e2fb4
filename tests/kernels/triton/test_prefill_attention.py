"""Attention of prompts over pages: the Triton kernel against torch, and its bits.

What no row may read, blocks of nobody and positions after the last one, is NaN.
"""

from __future__ import annotations

import pytest
import torch

from vllm.kernels.prefill_attention import plan_tiles
from vllm.kernels.prefill_attention import rope_attend as face
from vllm.kernels.triton.offline import ARCHITECTURES
from vllm.kernels.triton.prefill_attention import rope_attend

BLOCK_SIZE = 16
HEAD_DIM = 16
NUM_HEADS = 2
NUM_KV_HEADS = 1
SCALE = HEAD_DIM**-0.5


class Prompts:
    """Sequences on scattered pages, whose keys and values are all written; queries by position."""

    def __init__(self, lengths, *, dtype, cache_dtype=None):
        counts = [-(-length // BLOCK_SIZE) for length in lengths]
        order = torch.randperm(sum(counts) + 1)
        cache = torch.full((2, len(order), NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM), float("nan"))
        self.block_tables = []
        for length, count in zip(lengths, counts, strict=True):
            blocks, order = order[:count], order[count:]
            self.block_tables.append(blocks)
            for position in range(length):
                block = blocks[position // BLOCK_SIZE]
                new = torch.randn(2, NUM_KV_HEADS, HEAD_DIM)
                cache[:, block, :, position % BLOCK_SIZE] = new
        self.cache = cache.to(cache_dtype or dtype)
        width = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
        self.qkv = [(torch.randn(length, width) * 2).to(dtype) for length in lengths]
        angles = torch.randn(max(lengths), 1, HEAD_DIM // 2)
        self.cos = torch.cat([angles.cos()] * 2, -1).to(dtype)
        self.signed_sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)

    def attend(self, device, runs, *, by=rope_attend):
        """Context of each run (sequence, start, end), as one step with rows in any order."""
        lengths = [end - start for _, start, end in runs]
        rows = torch.randperm(sum(lengths) + 2)[: sum(lengths)].split(lengths)
        qkv = torch.full((sum(lengths) + 2, self.qkv[0].shape[1]), float("nan"))
        qkv = qkv.to(self.qkv[0].dtype)
        for each, (sequence, start, end) in zip(rows, runs, strict=True):
            qkv[each] = self.qkv[sequence][start:end]
        tables = [self.block_tables[sequence].to(device) for sequence, _, _ in runs]
        starts = [start for _, start, _ in runs]
        tiles = plan_tiles([each.to(device) for each in rows], tables, starts)
        arguments = [x.to(device) for x in (qkv, self.cos, self.signed_sin, self.cache)]
        planned = (tiles,) if by is face else (tiles.block_tables, tiles.rows, tiles.tiles)
        context = by(*arguments, *planned, NUM_HEADS, SCALE).cpu()
        return [context[each] for each in rows]


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "tolerance"),
    [
        (torch.float32, None, 2e-5),
        (torch.float16, None, 4e-3),
        (torch.bfloat16, None, 3e-2),
        (torch.bfloat16, torch.float8_e4m3fn, 3e-2),
    ],
)
def test_equals_the_reference(device, dtype, cache_dtype, tolerance):
    torch.manual_seed(1)
    prompts = Prompts([70, 1, 20], dtype=dtype, cache_dtype=cache_dtype)
    runs = [(0, 0, 70), (1, 0, 1), (2, 15, 20)]
    expected = prompts.attend(torch.device("cpu"), runs, by=face)
    context = prompts.attend(device, runs)
    for each, wanted in zip(context, expected, strict=True):
        torch.testing.assert_close(each, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_chunks_and_company_change_no_bit(device, dtype):
    torch.manual_seed(1)
    prompts = Prompts([80, 40], dtype=dtype)
    (whole,) = prompts.attend(device, [(0, 0, 80)])
    first, neighbour, second = prompts.attend(device, [(0, 0, 37), (1, 5, 40), (0, 37, 80)])
    assert torch.equal(torch.cat([first, second]), whole)
    (alone,) = prompts.attend(device, [(1, 5, 40)])
    assert torch.equal(neighbour, alone)


def test_tiles_without_rows_are_padding(device):
    prompts = Prompts([20], dtype=torch.float32)
    tiles = plan_tiles([torch.arange(20)], prompts.block_tables, [0])
    padded = torch.cat([tiles.tiles, torch.tensor([[10**6, 10**6, 0, 0]], dtype=torch.int32)])
    arguments = [x.to(device) for x in (prompts.qkv[0], prompts.cos, prompts.signed_sin)]
    cache, table, rows = (x.to(device) for x in (prompts.cache, tiles.block_tables, tiles.rows))
    context = rope_attend(*arguments, cache, table, rows, padded.to(device), NUM_HEADS, SCALE)
    (expected,) = prompts.attend(device, [(0, 0, 20)])
    assert torch.equal(context.cpu(), expected)


MODEL = {"NUM_HEADS": 24, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK_SIZE": 32}


def _compile(compile_offline, arch, dtype, cache_dtype, *, pdl=False):
    model = ("qkv_ptr", "cos_ptr", "signed_sin_ptr", "context_ptr")
    shape = {"QUERIES": 16, "KEYS": 32} if dtype == "fp32" else {"QUERIES": 64, "KEYS": 64}
    return compile_offline(
        "vllm.kernels.triton.prefill_attention:prefill_attention_kernel",
        {
            **dict.fromkeys(model, f"*{dtype}"),
            "cache_ptr": f"*{cache_dtype}",
            **dict.fromkeys(("block_tables_ptr", "rows_ptr"), "*i64"),
            "tiles_ptr": "*i32",
            "scale": "fp32",
            "value_offset": "i64:16",
            "block_table_stride": "i64",
        },
        MODEL | shape | {"PDL": pdl},
        arch,
        num_warps=4 if arch == 90 or dtype == "fp32" else 8,
        num_stages=5,
        launch_pdl=pdl,
    )


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_with_pipelined_loads_and_tensor_cores(compile_offline, arch):
    compiled = _compile(compile_offline, arch, "bf16", "bf16")
    wanted = "HGMMA.64x64x16" if arch == 90 else "HMMA"
    assert compiled.faults(contains=("LDGSTS", wanted)) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8e4nv"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_number_type(compile_offline, arch, dtype):
    if dtype == "fp8e4nv" and arch == 80:
        pytest.skip("the card has no such numbers")
    model = "bf16" if dtype == "fp8e4nv" else dtype
    compiled = _compile(compile_offline, arch, model, dtype, pdl=arch == 90)
    wanted = {"fp32": "FFMA"}.get(dtype, "HGMMA" if arch == 90 else "HMMA")
    assert compiled.faults(contains=("LDGSTS", wanted)) == []
    assert compiled.waits_first() == (arch == 90)
