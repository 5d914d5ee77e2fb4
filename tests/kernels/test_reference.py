"""Row operations against formulas written out in float64."""

import torch

from vllm.kernels.cache import (
    allocate_kv_caches,
    cache_rows,
    clear_blocks,
    slots_of_positions,
    write_kv,
)
from vllm.kernels.reference import apply_rope, rms_norm, silu_mul


def test_rms_norm_formula():
    x, weight = torch.randn(5, 32), torch.randn(32)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected.float())


def test_rms_norm_leaves_its_input_alone():
    x = torch.randn(3, 8)
    before = x.clone()
    rms_norm(x, torch.ones(8), 1e-5)
    assert torch.equal(x, before)


def test_rms_norm_in_bfloat16_keeps_float32_statistics():
    x = torch.full((1, 4096), 3.0, dtype=torch.bfloat16)
    normed = rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 1e-5)
    assert normed.dtype == torch.bfloat16
    assert torch.equal(normed, torch.ones_like(normed))


def test_silu_mul_takes_gate_first():
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(silu_mul(torch.cat([gate, up], -1)), expected)


def test_rope_turns_pairs_of_both_halves_by_the_angle():
    angle = torch.tensor([0.3, 1.1])
    cos, sin = angle.cos().repeat(2), angle.sin()
    x = torch.randn(1, 1, 4)
    turned = apply_rope(x, cos.view(1, 1, 4), torch.cat([-sin, sin]).view(1, 1, 4))
    first, second = x[0, 0, :2], x[0, 0, 2:]
    expected = torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
    )
    torch.testing.assert_close(turned[0, 0], expected)


def test_cache_stores_a_position_at_its_slot():
    (cache,) = allocate_kv_caches(1, 4, 8, 2, 3, dtype=torch.float32)
    slots = slots_of_positions(torch.tensor([3, 1]), torch.tensor([2, 9]), 8)
    assert slots.tolist() == [3 * 8 + 2, 1 * 8 + 1]
    keys, values = torch.randn(2, 2, 3), torch.randn(2, 2, 3)
    write_kv(cache, cache_rows(slots, cache), torch.cat([keys, values], dim=1))
    assert torch.equal(cache[0, 3, :, 2], keys[0])
    assert torch.equal(cache[1, 1, :, 1], values[1])


def test_clearing_blocks_leaves_the_others():
    caches = allocate_kv_caches(2, 4, 8, 2, 3, dtype=torch.float32)
    for cache in caches:
        cache.fill_(float("nan"))
    clear_blocks(caches, [2, 0])
    for cache in caches:
        assert not cache[:, [0, 2]].any()
        assert cache[:, [1, 3]].isnan().all()
