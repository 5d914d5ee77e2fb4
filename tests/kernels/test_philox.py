"""Philox against the published vectors, and what its noise may depend on."""

import pytest
import torch

from vllm.kernels.philox import Purpose, philox4x32, uniform
from vllm.seeds import derive_seed

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(counter, key, expected):
    words = philox4x32([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert tuple(int(w) for w in words) == expected


def test_uniform_uses_word_zero_of_step_codebook_purpose():
    noise = uniform(torch.tensor([-1]), torch.tensor([5]), 3, [Purpose.RAS_REDRAW])[0]
    counter = [torch.tensor([5]), torch.tensor([2]), torch.tensor([1]), torch.tensor([0])]
    word = philox4x32(counter, [torch.tensor([ONES])] * 2)[0]
    assert noise[0, 2] == (int(word) >> 8) / 2**24


def test_noise_does_not_depend_on_the_batch():
    seed = torch.arange(16) * 7919 - 5
    step = torch.arange(16) * 3
    together = uniform(seed, step, 8, tuple(Purpose))
    for row in (0, 7, 15):
        alone = uniform(seed[row : row + 1], step[row : row + 1], 8, tuple(Purpose))
        assert all(torch.equal(a[0], t[row]) for a, t in zip(alone, together, strict=True))


def test_every_part_of_the_counter_and_key_matters():
    seed = torch.tensor([1, 2, 1 + (1 << 40), 1])
    draw, redraw = uniform(seed, torch.tensor([0, 0, 0, 1]), 8, tuple(Purpose))
    assert torch.cat([draw, redraw]).unique().numel() == 2 * 4 * 8


def test_noise_is_uniform_below_one():
    noise = uniform(torch.arange(500), torch.arange(500), 8, [Purpose.DRAW])[0]
    assert noise.dtype == torch.float32
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(noise.mean().item() - 0.5) < 0.02
    assert abs(noise.var().item() - 1 / 12) < 0.005


def test_parts_of_a_text_have_their_own_seeds():
    assert derive_seed(42, 0) == 42
    seeds = {derive_seed(seed, part) for seed in range(40) for part in range(40)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derive_seed(2**64 - 1, 3) == derive_seed(2**64 - 1, 3)
