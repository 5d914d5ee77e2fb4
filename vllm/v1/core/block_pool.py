"""Blocks of the KV cache: which are free, who shares them, and what the cached ones hold.

Knows block ids and opaque hashes only; neither requests nor positions.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from enum import IntEnum

__all__ = ["BlockPool"]

_MAX_PINNED_SHARE = 4  # one block in so many may be pinned


class _Rank(IntEnum):
    """What a block's content is worth while nobody uses it; the least is evicted first."""

    PLAIN = 0  # nobody has found it, or there is none
    FOUND = 1
    PINNED = 2


class BlockPool:
    """Reference-counted blocks with a prefix cache among the free ones.

    Free blocks are taken in this order: those without content, then cached ones that nobody has
    ever found, then those that somebody has, then pinned ones, each from least to most recently
    used. So what prompts share outlives what only one of them said, and what is pinned is there
    until nothing else is left to take. Taking a cached block evicts its content.

    A pinned block is as free as any other. At most ``max_pinned`` blocks are pinned; a further one
    takes the place of that which has been unused for longest.
    """

    def __init__(self, num_blocks: int, *, enable_caching: bool) -> None:
        assert num_blocks > 0, num_blocks
        self.num_blocks = num_blocks
        self.enable_caching = enable_caching
        self.max_pinned = num_blocks // _MAX_PINNED_SHARE if enable_caching else 0
        self._num_pinned = 0
        self._free: tuple[OrderedDict[int, None], ...] = tuple(OrderedDict() for _ in _Rank)
        self._free[_Rank.PLAIN].update(dict.fromkeys(range(num_blocks)))
        self._ranks = [_Rank.PLAIN] * num_blocks  # [num_blocks]
        self._ref_counts = [0] * num_blocks  # [num_blocks]
        self._hashes: list[bytes | None] = [None] * num_blocks  # [num_blocks]
        self._cached: dict[bytes, int] = {}  # hash -> block id

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, cached ones included."""
        return sum(map(len, self._free))

    @property
    def num_pinned(self) -> int:
        """Pinned blocks, in use or not."""
        return self._num_pinned

    @property
    def usage(self) -> float:
        """Share of blocks in use."""
        return 1.0 - self.num_free / self.num_blocks

    def is_free(self, block_id: int) -> bool:
        return self._ref_counts[block_id] == 0

    def find(self, block_hash: bytes) -> int | None:
        """Block that holds this content, or None."""
        return self._cached.get(block_hash)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take free blocks for new content; there must be enough of them."""
        assert 0 <= num_blocks <= self.num_free, (num_blocks, self.num_free)
        block_ids = []
        for _ in range(num_blocks):
            block_id, _ = next(filter(None, self._free)).popitem(last=False)
            self._ref_counts[block_id] = 1
            self._evict(block_id)
            block_ids.append(block_id)
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Take cached blocks for their content, together with their other users."""
        for block_id in block_ids:
            assert self._hashes[block_id] is not None, block_id
            if self._ref_counts[block_id] == 0:
                del self._free[self._ranks[block_id]][block_id]
            self._ref_counts[block_id] += 1
            self._set_rank(block_id, max(self._ranks[block_id], _Rank.FOUND))

    def release(self, block_ids: Sequence[int]) -> None:
        """Give blocks of one table back, given in the order of their positions.

        The last positions become the first to be evicted, since a block is found only if all
        blocks before it are.
        """
        for block_id in reversed(block_ids):
            assert self._ref_counts[block_id] > 0, block_id
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] > 0:
                continue
            free = self._free[self._ranks[block_id]]
            free[block_id] = None
            if self._hashes[block_id] is None:
                free.move_to_end(block_id, last=False)

    def publish(self, block_id: int, block_hash: bytes, *, pinned: bool = False) -> None:
        """Let others find the content of a used block. Content known already stays where it is.

        ``pinned`` content is kept longest, wherever it is, as far as there is room for it.
        """
        assert self._ref_counts[block_id] > 0, block_id
        if not self.enable_caching:
            return
        if self._hashes[block_id] is None and block_hash not in self._cached:
            self._hashes[block_id] = block_hash
            self._cached[block_hash] = block_id
        if pinned and block_hash in self._cached:
            self._pin(self._cached[block_hash])

    def _pin(self, block_id: int) -> None:
        if self._ranks[block_id] is _Rank.PINNED:
            return
        if self._num_pinned >= self.max_pinned:
            unused = self._free[_Rank.PINNED]
            if not unused:
                return
            self._set_rank(next(iter(unused)), _Rank.FOUND)
        self._set_rank(block_id, _Rank.PINNED)

    def _set_rank(self, block_id: int, rank: _Rank) -> None:
        """Rank a block anew; a free one becomes the most recently used of its rank."""
        if self.is_free(block_id):
            del self._free[self._ranks[block_id]][block_id]
            self._free[rank][block_id] = None
        self._num_pinned += (rank is _Rank.PINNED) - (self._ranks[block_id] is _Rank.PINNED)
        self._ranks[block_id] = rank

    def _evict(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._cached[block_hash]
            self._hashes[block_id] = None
        self._set_rank(block_id, _Rank.PLAIN)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that counts, free list and hashes agree with the block tables in use."""
        uses = Counter(block_id for table in tables for block_id in table)
        for block_id in range(self.num_blocks):
            assert self._ref_counts[block_id] == uses[block_id], (
                f"block {block_id}: counted {self._ref_counts[block_id]}, used {uses[block_id]}"
            )
            listed = [rank for rank in _Rank if block_id in self._free[rank]]
            expected = [self._ranks[block_id]] if self.is_free(block_id) else []
            assert listed == expected, f"block {block_id}: listed as {listed}, is {expected}"
            is_plain = self._ranks[block_id] is _Rank.PLAIN
            assert is_plain or self._hashes[block_id] is not None, f"block {block_id} holds nothing"
        assert self._num_pinned == self._ranks.count(_Rank.PINNED) <= self.max_pinned
        cached = {h: block_id for block_id, h in enumerate(self._hashes) if h is not None}
        assert cached == self._cached, "hashes and cached blocks disagree"
