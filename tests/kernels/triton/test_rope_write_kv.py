"""Keys and values of new positions in their pages: the Triton kernel against torch."""

from __future__ import annotations

import pytest
import torch

from vllm.kernels import reference
from vllm.kernels.triton.rope_write_kv import rope_write_kv

NUM_POSITIONS = 64


@pytest.mark.parametrize("heads", [(4, 2), (6, 3), (3, 1)])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
)
def test_equals_the_reference(device, dtype, cache_dtype, heads):
    num_heads, num_kv_heads = heads
    head_dim, block_size, num_blocks, num_rows = 32, 8, 5, 7
    qkv = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    angles = torch.randn(NUM_POSITIONS, 1, head_dim // 2)
    cos = torch.cat([angles.cos()] * 2, -1).to(dtype)
    signed_sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    shape = (2, num_blocks, num_kv_heads, block_size, head_dim)
    cache = torch.full(shape, float("nan")).to(cache_dtype)
    slots = torch.randperm(num_blocks * block_size)[:num_rows]
    slots[2] = -1
    positions = torch.randint(NUM_POSITIONS, (num_rows,))

    expected = cache.clone()
    arguments = (slots, positions, num_heads)
    reference.rope_write_kv(qkv, cos, signed_sin, expected, *arguments)
    written = cache.to(device)
    tables = (cos.to(device), signed_sin.to(device))
    rope_write_kv(
        qkv.to(device), *tables, written, slots.to(device), positions.to(device), num_heads
    )

    # One rounding may fall the other way where a product and a sum are rounded together.
    tolerance = {"rtol": 0.13 if cache_dtype.itemsize == 1 else torch.finfo(dtype).eps * 2}
    torch.testing.assert_close(
        written.cpu().float(), expected.float(), atol=1e-2, equal_nan=True, **tolerance
    )


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(compile_offline, arch):
    compiled = compile_offline(
        "vllm.kernels.triton.rope_write_kv:rope_write_kv_kernel",
        {
            **dict.fromkeys(("qkv_ptr", "cos_ptr", "signed_sin_ptr", "cache_ptr"), "*bf16"),
            **dict.fromkeys(("slots_ptr", "positions_ptr"), "*i64"),
            "value_offset": "i64:16",
        },
        {"NUM_HEADS": 24, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK_SIZE": 32, "HEADS": 8},
        arch,
    )
    assert compiled.faults(contains=("LDG.E.64", "STG.E.64")) == []
