"""Blocks of the KV cache: which are free, who shares them, and what the cached ones hold.

Knows block ids and opaque hashes only; neither requests nor positions.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

__all__ = ["BlockPool"]


class BlockPool:
    """Reference-counted blocks with a prefix cache among the free ones.

    Free blocks are taken in this order: those without content, then cached ones that nobody has
    ever found, then those that somebody has, each from least to most recently used. So what prompts
    share, which is their voice, outlives what only one of them said. Taking a cached block evicts
    its content.
    """

    def __init__(self, num_blocks: int, *, enable_caching: bool) -> None:
        assert num_blocks > 0, num_blocks
        self.num_blocks = num_blocks
        self.enable_caching = enable_caching
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._free_shared: OrderedDict[int, None] = OrderedDict()  # of the free, those found once
        self._was_found = [False] * num_blocks  # [num_blocks]
        self._ref_counts = [0] * num_blocks  # [num_blocks]
        self._hashes: list[bytes | None] = [None] * num_blocks  # [num_blocks]
        self._cached: dict[bytes, int] = {}  # hash -> block id

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, cached ones included."""
        return len(self._free) + len(self._free_shared)

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
            block_id, _ = (self._free or self._free_shared).popitem(last=False)
            self._evict(block_id)
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Take cached blocks for their content, together with their other users."""
        for block_id in block_ids:
            assert self._hashes[block_id] is not None, block_id
            if self._ref_counts[block_id] == 0:
                del self._free_list_of(block_id)[block_id]
            self._was_found[block_id] = True
            self._ref_counts[block_id] += 1

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
            self._free_list_of(block_id)[block_id] = None
            if self._hashes[block_id] is None:
                self._free.move_to_end(block_id, last=False)

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Let others find the content of a used block. Content known already stays where it is."""
        assert self._ref_counts[block_id] > 0, block_id
        if not self.enable_caching or self._hashes[block_id] is not None:
            return
        if block_hash in self._cached:
            return
        self._hashes[block_id] = block_hash
        self._cached[block_hash] = block_id

    def _evict(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._cached[block_hash]
            self._hashes[block_id] = None
            self._was_found[block_id] = False

    def _free_list_of(self, block_id: int) -> OrderedDict[int, None]:
        """Where the block is, or would be, while it is free."""
        return self._free_shared if self._was_found[block_id] else self._free

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that counts, free list and hashes agree with the block tables in use."""
        uses = Counter(block_id for table in tables for block_id in table)
        for block_id in range(self.num_blocks):
            assert self._ref_counts[block_id] == uses[block_id], (
                f"block {block_id}: counted {self._ref_counts[block_id]}, used {uses[block_id]}"
            )
            is_listed = block_id in self._free_list_of(block_id)
            assert is_listed == self.is_free(block_id), block_id
        assert self._free.keys().isdisjoint(self._free_shared)
        cached = {h: block_id for block_id, h in enumerate(self._hashes) if h is not None}
        assert cached == self._cached, "hashes and cached blocks disagree"
