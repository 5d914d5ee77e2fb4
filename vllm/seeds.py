"""Seeds of the parts that a long text is split into.

A pure function of the request's seed, so that a split text repeats as a whole; it knows nothing
of how a seed becomes noise (``kernels.philox``).
"""

from __future__ import annotations

from hashlib import blake2b

__all__ = ["derive_seed"]

_SEED_BYTES = 8


def derive_seed(seed: int, part: int) -> int:
    """Seed of part number ``part`` (0 … 2**64 - 1), as 0 … 2**64 - 1; part 0 keeps ``seed``.

    Neighbouring seeds must not share parts, which ``seed + part`` would do; hence a hash.
    """
    if part == 0:
        return seed
    numbers = seed.to_bytes(_SEED_BYTES, "little") + part.to_bytes(_SEED_BYTES, "little")
    return int.from_bytes(blake2b(numbers, digest_size=_SEED_BYTES).digest(), "little")
