"""Block pool: counts, order of reuse, and random operations against a plain rebuild."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.v1.core import BlockPool


def _cached(pool: BlockPool, *hashes: bytes, pinned: bool = False) -> list[int]:
    """Blocks with published content, given back."""
    blocks = pool.allocate(len(hashes))
    for block_id, block_hash in zip(blocks, hashes, strict=True):
        pool.publish(block_id, block_hash, pinned=pinned)
    pool.release(blocks)
    return blocks


def test_usage_counts_blocks_that_cannot_be_taken():
    pool = BlockPool(4, enable_caching=True)
    pool.allocate(3)
    assert (pool.num_free, pool.usage) == (1, 0.75)


def test_released_block_keeps_its_content_until_it_is_taken():
    pool = BlockPool(2, enable_caching=True)
    (block,) = _cached(pool, b"x")
    assert pool.find(b"x") == block
    pool.allocate(2)
    assert pool.find(b"x") is None


def test_blocks_without_content_are_taken_before_cached_ones():
    pool = BlockPool(3, enable_caching=True)
    _cached(pool, b"x")
    plain = pool.allocate(2)
    pool.release(plain)
    assert set(pool.allocate(2)) == set(plain)
    assert pool.find(b"x") is not None


def test_least_recently_used_content_is_evicted_first():
    pool = BlockPool(2, enable_caching=True)
    _cached(pool, b"old")
    _cached(pool, b"new")
    hit = pool.find(b"old")
    assert hit is not None
    pool.share([hit])
    pool.release([hit])
    pool.allocate(1)
    assert pool.find(b"old") == hit
    assert pool.find(b"new") is None


def test_end_of_a_prompt_is_evicted_before_its_beginning():
    pool = BlockPool(3, enable_caching=True)
    _cached(pool, b"1", b"12", b"123")
    pool.allocate(1)
    assert [pool.find(h) is not None for h in (b"1", b"12", b"123")] == [True, True, False]


def test_what_was_found_once_outlives_what_nobody_asked_for():
    pool = BlockPool(4, enable_caching=True)
    voice, *_ = _cached(pool, b"voice", b"text")
    pool.share([voice])
    pool.release([voice])
    for index in range(5):
        _cached(pool, b"other text %d" % index, b"more %d" % index)
        assert pool.find(b"voice") == voice
    pool.allocate(4)
    assert pool.find(b"voice") is None, "it goes when nothing else is left"


def test_what_is_pinned_outlives_what_was_found():
    pool = BlockPool(8, enable_caching=True)
    _cached(pool, b"voice", pinned=True)
    for index in range(20):
        found = _cached(pool, b"%d" % index)
        pool.share(found)
        pool.release(found)
    assert pool.find(b"voice") is not None
    assert pool.find(b"0") is None


def test_pinned_blocks_are_free_and_taken_last():
    pool = BlockPool(8, enable_caching=True)
    _cached(pool, b"voice", pinned=True)
    assert (pool.num_pinned, pool.num_free, pool.usage) == (1, 8, 0)
    most = pool.allocate(7)
    assert pool.find(b"voice") is not None
    last = pool.allocate(1)
    assert pool.find(b"voice") is None
    assert pool.num_pinned == 0
    pool.check_integrity([most, last])


def test_a_quarter_is_pinned_at_most_and_the_longest_unused_gives_way():
    pool = BlockPool(8, enable_caching=True)
    for name in (b"a", b"b", b"c"):
        _cached(pool, name, pinned=True)
    assert pool.num_pinned == pool.max_pinned == 2
    pool.allocate(6)
    assert [pool.find(name) is not None for name in (b"a", b"b", b"c")] == [False, True, True]


def test_a_voice_in_use_keeps_its_pin_before_a_new_one():
    pool = BlockPool(8, enable_caching=True)
    blocks = pool.allocate(3)
    for block_id in blocks:
        pool.publish(block_id, b"%d" % block_id, pinned=True)
    assert pool.num_pinned == 2
    pool.release(blocks)
    pool.allocate(6)
    assert [pool.find(b"%d" % block_id) is not None for block_id in blocks] == [True, True, False]


def test_known_content_is_pinned_where_it_is():
    pool = BlockPool(4, enable_caching=True)
    (first,) = _cached(pool, b"x")
    second = pool.allocate(1)
    pool.publish(second[0], b"x", pinned=True)
    pool.release(second)
    pool.allocate(3)
    assert pool.find(b"x") == first


def test_nothing_is_pinned_without_caching():
    pool = BlockPool(8, enable_caching=False)
    _cached(pool, b"voice", pinned=True)
    assert (pool.max_pinned, pool.num_pinned) == (0, 0)
    pool.check_integrity([])


def test_evicted_content_leaves_no_claim_on_its_block():
    pool = BlockPool(2, enable_caching=True)
    (old,) = _cached(pool, b"old")
    pool.share([old])
    pool.release([old])
    pool.release(pool.allocate(2))
    (first,) = _cached(pool, b"first")
    (second,) = _cached(pool, b"second")
    assert {first, second} == {0, 1}
    pool.allocate(1)
    assert pool.find(b"first") is None
    assert pool.find(b"second") == second


def test_shared_block_is_free_when_its_last_user_leaves():
    pool = BlockPool(2, enable_caching=True)
    (block,) = _cached(pool, b"x")
    pool.share([block])
    pool.share([block])
    pool.release([block])
    assert not pool.is_free(block)
    pool.release([block])
    assert pool.is_free(block)


def test_equal_content_is_published_once():
    pool = BlockPool(3, enable_caching=True)
    first, second = pool.allocate(2)
    pool.publish(first, b"x")
    pool.publish(second, b"x")
    assert pool.find(b"x") == first
    pool.check_integrity([[first, second]])


def test_integrity_check_notices_a_lost_block():
    pool = BlockPool(2, enable_caching=True)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="counted 1, used 0"):
        pool.check_integrity([])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=60))
def test_random_operations_keep_the_pool_whole(operations):
    pool = BlockPool(9, enable_caching=True)
    tables: list[list[int]] = []
    for kind, value in operations:
        if kind == 0 and value <= pool.num_free:
            tables.append(pool.allocate(value))
        elif kind == 1 and tables:
            pool.release(tables.pop(value % len(tables)))
        elif kind in (2, 4) and tables:
            for block_id in tables[value % len(tables)]:
                pool.publish(block_id, b"%d" % (block_id + value), pinned=kind == 4)
        elif kind == 3 and (hit := pool.find(b"%d" % value)) is not None:
            pool.share([hit])
            tables.append([hit])
        pool.check_integrity(tables)
    for table in tables:
        pool.release(table)
    assert pool.num_free == 9
