"""Philox4x32-10, the counter-based generator behind every draw, in plain integer tensor ops.

A number depends on its key and counter alone, never on a position in a batch; what it is used
for is the sampler's business. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2,
3" (2011), whose published test vectors it reproduces.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Purpose", "philox4x32", "uniform"]

_NUM_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a number is for; part of the counter, so that no two uses share one."""

    DRAW = 0
    RAS_REDRAW = 1


def uniform(
    seed: Tensor, step: Tensor, num_codebooks: int, purposes: Sequence[Purpose]
) -> list[Tensor]:
    """One number in [0, 1) per (seed, step, codebook, purpose), with 24 random bits.

    Args:
        seed: int64 [num_rows], bit pattern of an unsigned 64-bit seed.
        step: int64 [num_rows], the frame that is drawn, below 2**32.
        num_codebooks: K.
        purposes: the uses wanted.

    Returns:
        float32 [num_rows, num_codebooks] for each purpose. Times a positive float32 it stays
        below it, since 1 - 2**-24 is the largest value.
    """
    which, codebook, zero = _grid(tuple(purposes), num_codebooks, seed.device)
    shape = (len(purposes), len(seed), num_codebooks)
    counter = [word.expand(shape) for word in (step[:, None], codebook, which, zero)]
    seed = seed[None, :, None]
    word = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))[0]
    return list(((word >> 8).float() * 2.0**-24).unbind())


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> Sequence[Tensor]:
    """Ten rounds over four counter words and two key words, each an int64 tensor below 2**32.

    Counter words share one shape; key words have as many axes and broadcast to it. Four words of
    that shape come back.
    """
    # Words 0 and 2 are multiplied, 3 and 1 are mixed in: two stacks, so that one op serves both.
    # int64 products wrap modulo 2**64, which leaves their bits right; the high word is masked
    # after the shift, and what lies above the low word is masked one round later.
    assert counter[0].dim() == key[0].dim(), "the stacks' first axis must line up"
    ones = (1,) * counter[0].dim()
    multiplier, weyl = _round_constants(key[0].device)
    multiplier = multiplier.view(2, *ones)
    keys = (torch.stack((key[1], key[0])) + weyl.view(_NUM_ROUNDS, 2, *ones)) & _MASK
    factors = torch.stack((counter[0], counter[2]))
    mixed = torch.stack((counter[3], counter[1]))
    for round_key in keys.unbind():
        product = factors * multiplier
        high = (product >> 32).bitwise_xor_(mixed).bitwise_xor_(round_key).bitwise_and_(_MASK)
        factors = high.flip(0)
        mixed = product
    mixed = mixed & _MASK
    return factors[0], mixed[1], factors[1], mixed[0]


@lru_cache(maxsize=32)
def _round_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Multipliers [2] and what each round adds to key words 1 and 0, [num_rounds, 2]."""
    weyl = [[r * _WEYL[1] & _MASK, r * _WEYL[0] & _MASK] for r in range(_NUM_ROUNDS)]
    with torch.inference_mode(False):
        return (
            torch.tensor(_MULTIPLIERS, dtype=torch.int64, device=device),
            torch.tensor(weyl, dtype=torch.int64, device=device),
        )


@lru_cache(maxsize=32)
def _grid(
    purposes: tuple[Purpose, ...], num_codebooks: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Counter words 2, 1 and 3: purposes [P, 1, 1], codebooks [K] and a zero [1]."""
    with torch.inference_mode(False):
        return (
            torch.tensor(purposes, dtype=torch.int64, device=device)[:, None, None],
            torch.arange(num_codebooks, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
