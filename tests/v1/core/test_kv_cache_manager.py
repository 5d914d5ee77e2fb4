"""KV cache manager: prefix hashes, what enters the cache, and refusals that change nothing."""

from __future__ import annotations

import pytest

from vllm.v1.core import KVCacheManager, hash_prompt_blocks
from vllm.v1.request import RequestStatus

BLOCK = 8


@pytest.fixture
def manager():
    return KVCacheManager(8, BLOCK, enable_prefix_caching=True)


def _prefill(manager, request, num_positions):
    """Pretend that a step wrote the prompt up to ``num_positions``."""
    request.num_prefilled = num_positions
    manager.publish(request)


def test_only_full_blocks_have_a_hash(make_request):
    assert [len(hash_prompt_blocks(make_request("a", n), BLOCK)) for n in (7, 8, 17)] == [0, 1, 2]


def test_hash_covers_everything_before_the_block(make_request):
    first, second = make_request("a", 16, token_seed=1), make_request("b", 16, token_seed=1)
    second.prompt_token_ids = second.prompt_token_ids.copy()
    second.prompt_token_ids[0] += 1
    pairs = zip(hash_prompt_blocks(first, BLOCK), hash_prompt_blocks(second, BLOCK), strict=True)
    assert all(one != other for one, other in pairs)


def test_hash_covers_clip_codes(make_request):
    first = make_request("a", 16, token_seed=1, num_audio=12)
    second = make_request("b", 16, token_seed=1, num_audio=12)
    second.prompt_frames[-1, -1] += 1  # fills position 12, in the second block
    one, other = hash_prompt_blocks(first, BLOCK), hash_prompt_blocks(second, BLOCK)
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_nothing_is_found_before_it_was_written(manager, make_request):
    first, second = make_request("a", 24, token_seed=1), make_request("b", 24, token_seed=1)
    manager.allocate_prompt(first)
    assert manager.get_computed_blocks(second) == []
    _prefill(manager, first, 20)
    assert manager.get_computed_blocks(second) == list(manager.blocks_of(first)[:2])


def test_generated_positions_never_enter_the_cache(manager, make_request):
    first = make_request("a", 12, token_seed=1)
    manager.allocate_prompt(first)
    _prefill(manager, first, 12)
    first.record_bos_frame(1024)
    for _ in range(8):
        first.append_frame(b"\0\0" * first.num_codebooks)
    manager.allocate_slots(first, first.num_slots_needed)
    manager.publish(first)
    assert len(manager.blocks_of(first)) == 3
    assert len(manager.get_computed_blocks(make_request("b", 24, token_seed=1))) == 1


def test_whole_blocks_of_what_is_to_be_pinned_are(make_request):
    manager = KVCacheManager(32, BLOCK, enable_prefix_caching=True)
    request = make_request("a", 40, num_pinned=2 * BLOCK + 7)
    manager.allocate_prompt(request)
    _prefill(manager, request, BLOCK)
    assert manager.num_pinned_blocks == 1
    _prefill(manager, request, 40)
    assert manager.num_pinned_blocks == 2
    manager.free(request)
    other = make_request("other", 30 * BLOCK - 1)
    manager.allocate_prompt(other)
    assert len(manager.get_computed_blocks(make_request("a", 40))) == 2


def test_a_cached_beginning_is_shared(manager, make_request):
    first, second = make_request("a", 20, token_seed=1), make_request("b", 20, token_seed=1)
    manager.allocate_prompt(first)
    _prefill(manager, first, 20)
    manager.allocate_prompt(second)
    assert manager.blocks_of(first)[:2] == manager.blocks_of(second)[:2]
    assert manager.num_free_blocks == 8 - 4
    assert second.num_prefilled == second.num_cached_positions == 16


def test_cached_blocks_in_use_cost_nothing(manager, make_request):
    first, second = make_request("a", 31, token_seed=1), make_request("b", 31, token_seed=1)
    manager.allocate_prompt(first)
    _prefill(manager, first, 31)
    assert manager.allocate_prompt(second, num_reserved_blocks=3) is not None


@pytest.mark.parametrize("num_reserved", [0, 3])
def test_refused_prompt_changes_nothing(manager, make_request, num_reserved):
    first = make_request("a", 16, token_seed=1)
    manager.allocate_prompt(first)
    _prefill(manager, first, 16)
    manager.free(first)
    manager.allocate_prompt(make_request("other", (5 - num_reserved) * BLOCK - 1))
    second = make_request("b", 32, token_seed=1)
    assert manager.allocate_prompt(second, num_reserved_blocks=num_reserved) is None
    assert manager.num_free_blocks == 3 + num_reserved
    assert (second.num_prefilled, manager.num_prefix_hits) == (0, 0)


def test_slots_are_refused_when_blocks_run_out(manager, make_request):
    request = make_request("a", 20)
    manager.allocate_prompt(request)
    assert manager.allocate_slots(request, 8 * BLOCK + 1) is None
    assert len(manager.allocate_slots(request, 8 * BLOCK)) == 5
    assert manager.usage == 1.0


def test_restored_blocks_can_be_found_again(manager, make_request):
    request = make_request("a", 24, token_seed=1)
    manager.allocate_prompt(request)
    request.num_prefilled = 16
    manager.free_blocks(request)
    manager.allocate_slots(request, request.num_slots_needed)
    _prefill(manager, request, 24)
    assert len(manager.get_computed_blocks(make_request("b", 24, token_seed=1))) == 3


def test_integrity_check_notices_a_leak(manager, make_request):
    request = make_request("a", 8)
    request.status = RequestStatus.PREFILLING
    manager.allocate_prompt(request)
    manager.check_integrity([request])
    with pytest.raises(AssertionError):
        manager.check_integrity([])
