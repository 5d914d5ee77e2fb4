"""Block tables of the requests, and which prompt beginnings are found in the cache.

Knows requests and positions; not when a step runs nor who is preempted.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import Request

__all__ = ["KVCacheManager", "hash_prompt_blocks"]

_HASH_BYTES = 16


class KVCacheManager:
    """Gives blocks to requests and takes them back.

    Only full blocks of prompt positions enter the prefix cache, and only through ``publish``,
    after the step that wrote them: generated positions are written by other kernels, whose
    last bits differ.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.block_size = block_size
        self.num_prefix_queries = 0  # positions asked for
        self.num_prefix_hits = 0  # positions found
        self._pool = BlockPool(num_blocks, enable_caching=enable_prefix_caching)
        self._tables: dict[str, list[int]] = {}  # req_id -> block ids in order of positions
        self._hashes: dict[str, tuple[bytes, ...]] = {}  # req_id -> hashes of full prompt blocks

    @property
    def num_positions(self) -> int:
        """Positions that the whole cache holds."""
        return self._pool.num_blocks * self.block_size

    @property
    def max_pinned_blocks(self) -> int:
        return self._pool.max_pinned

    @property
    def num_pinned_blocks(self) -> int:
        return self._pool.num_pinned

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def usage(self) -> float:
        """Share of blocks in use."""
        return self._pool.usage

    def blocks_of(self, request: Request) -> tuple[int, ...]:
        """The request's block table."""
        return tuple(self._tables.get(request.request_id, ()))

    def num_blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self.block_size)

    def get_computed_blocks(self, request: Request) -> list[int]:
        """Cached blocks that hold the beginning of the prompt, maybe all of it."""
        block_ids: list[int] = []
        if not self._pool.enable_caching:
            return block_ids
        for block_hash in self._prompt_hashes(request):
            block_id = self._pool.find(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def allocate_prompt(
        self, request: Request, *, num_reserved_blocks: int = 0
    ) -> tuple[int, ...] | None:
        """Blocks for a new request's prompt and first frame, cached ones first.

        Sets the request's ``num_prefilled`` and ``num_cached_positions``. None if that would
        leave fewer than ``num_reserved_blocks`` free blocks; then nothing has changed.
        """
        assert request.request_id not in self._tables, request.request_id
        cached = self.get_computed_blocks(request)
        num_new = self.num_blocks_for(request.num_slots_needed) - len(cached)
        num_from_free = num_new + sum(self._pool.is_free(block_id) for block_id in cached)
        if num_from_free + num_reserved_blocks > self._pool.num_free:
            return None
        self._pool.share(cached)  # before allocating, which would evict them
        self._tables[request.request_id] = cached + self._pool.allocate(num_new)
        request.num_cached_positions = len(cached) * self.block_size
        request.num_prefilled = request.num_cached_positions
        if self._pool.enable_caching:
            self.num_prefix_queries += request.num_prompt_positions
            self.num_prefix_hits += request.num_cached_positions
        return self.blocks_of(request)

    def needs_block(self, request: Request) -> bool:
        """Whether the next decode step would write past the request's blocks."""
        table = self._tables[request.request_id]
        return len(table) * self.block_size < request.num_slots_needed

    def allocate_slots(
        self, request: Request, num_positions: int, *, num_reserved_blocks: int = 0
    ) -> tuple[int, ...] | None:
        """New blocks, so that the table covers ``num_positions``; maybe none are needed.

        None if that would leave fewer than ``num_reserved_blocks`` free blocks; then nothing has
        changed.
        """
        table = self._tables.get(request.request_id, [])
        num_new = max(self.num_blocks_for(num_positions) - len(table), 0)
        if num_new + num_reserved_blocks > self._pool.num_free:
            return None
        new_blocks = self._pool.allocate(num_new)
        self._tables[request.request_id] = table + new_blocks
        return tuple(new_blocks)

    def publish(self, request: Request) -> None:
        """Let others find the full prompt blocks written so far; call after the step has run.

        Those that hold nothing but what the request wants pinned are pinned, if there is room.
        """
        if not self._pool.enable_caching:
            return
        hashes, table = self._prompt_hashes(request), self._tables[request.request_id]
        num_pinned = request.num_pinned_positions // self.block_size
        for index in range(min(request.num_prefilled // self.block_size, len(hashes))):
            self._pool.publish(table[index], hashes[index], pinned=index < num_pinned)

    def free_blocks(self, request: Request) -> None:
        """Take the request's blocks back; it may get others later."""
        self._pool.release(self._tables.pop(request.request_id, ()))

    def free(self, request: Request) -> None:
        """Take the request's blocks back and forget it."""
        self.free_blocks(request)
        self._hashes.pop(request.request_id, None)

    def _prompt_hashes(self, request: Request) -> tuple[bytes, ...]:
        hashes = self._hashes.get(request.request_id)
        if hashes is None:
            hashes = hash_prompt_blocks(request, self.block_size)
            self._hashes[request.request_id] = hashes
        return hashes

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Assert that exactly the given requests' tables exist and cover what was computed."""
        owners = {request.request_id: request for request in requests}
        assert self._tables.keys() == {i for i, request in owners.items() if request.owns_row}
        assert self._hashes.keys() <= owners.keys(), "hashes of a request that is gone"
        for request_id, table in self._tables.items():
            assert len(set(table)) == len(table), f"{request_id} holds a block twice"
            num_held = len(table) * self.block_size
            assert num_held >= owners[request_id].num_computed_positions, request_id
        self._pool.check_integrity(self._tables.values())


def hash_prompt_blocks(request: Request, block_size: int) -> tuple[bytes, ...]:
    """Hash of each full prompt block, each covering everything before it as well.

    A position is identified by its text id and, where a clip fills it, by the frame's codes.
    """
    num_positions = request.num_prompt_positions
    identity = np.full((num_positions, 1 + request.num_codebooks), -1, np.int32)  # [P, 1 + K]
    identity[:, 0] = request.prompt_token_ids
    identity[request.audio_positions, 1:] = request.prompt_frames
    hashes = [b""]
    for start, stop in pairwise(range(0, num_positions + 1, block_size)):
        content = hashes[-1] + identity[start:stop].tobytes()
        hashes.append(blake2b(content, digest_size=_HASH_BYTES).digest())
    return tuple(hashes[1:])
