"""Random arrivals, ends, preemptions and cache hits: every request keeps its own history."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vllm.outputs import FinishReason

NUM_CODEBOOKS = 4


class _Traffic:
    """Adds and ends requests at random, and remembers how each must end."""

    def __init__(self, bench, make_request, rng):
        self.bench, self.make_request, self.rng = bench, make_request, rng
        self.num_real = {}  # req_id -> real frames of an undisturbed end
        self.disturbed = {}  # req_id -> reasons that may come instead
        self.planned = {}  # req_id -> reason of an undisturbed end

    def arrive(self):
        rng, worker = self.rng, self.bench.worker
        name = f"r{len(self.planned)}"
        length = rng.choice([3, 8, 20, 24, 40])
        shared = rng.choice([None, 1, 2])
        limit = rng.randint(1, 50)
        end = rng.randint(0, 50)
        self.planned[name] = FinishReason.MAX_AUDIO
        self.num_real[name] = max(limit - NUM_CODEBOOKS, 0)
        worker.ends[name] = end
        if end + NUM_CODEBOOKS + 1 <= limit and limit > 1:
            self.planned[name], self.num_real[name] = FinishReason.STOP, end
        if rng.random() < 0.2 and self.num_real[name] > 0:
            worker.cuts[name] = self.num_real[name] = rng.randint(1, self.num_real[name])
            self.planned[name] = FinishReason.SILENCE
        self.bench.scheduler.add_request(
            self.make_request(
                name,
                length,
                frame_limit=limit,
                token_seed=shared,
                num_audio=2 if shared else 0,
                code_offset=rng.choice([0, 1]),
                num_pinned=8 * shared if shared else 0,
                priority=rng.choice([0, 0, 0, 1]),
            )
        )

    def disturb(self):
        name = f"r{self.rng.randrange(len(self.planned))}"
        reason = self.rng.choice([FinishReason.ABORT, FinishReason.DEADLINE, FinishReason.ERROR])
        self.disturbed.setdefault(name, set()).add(reason)
        if reason is FinishReason.ERROR:
            self.bench.worker.failing[name] = "made to fail"
        else:
            self.bench.scheduler.finish_requests([name], reason)


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic(make_bench, make_request, expected_codes, seed):
    rng = random.Random(seed)
    bench = make_bench(
        num_blocks=rng.choice([12, 16, 40]),
        block_size=8,
        max_num_seqs=rng.choice([2, 5, 8]),
        max_num_batched_tokens=rng.choice([16, 30, 128]),
        prefill_min_requests=rng.choice([1, 3]),
    )
    bench.worker.holds_audio = lambda: rng.random() < 0.5
    traffic = _Traffic(bench, make_request, rng)
    for _ in range(250):
        if rng.random() < 0.3:
            traffic.arrive()
        if traffic.planned and rng.random() < 0.04:
            traffic.disturb()
        bench.step()
    bench.run_until_idle()

    for name, planned in traffic.planned.items():
        reason = bench.reason(name)
        assert reason is planned or reason in traffic.disturbed.get(name, ()), name
        codes = bench.codes(name)
        expected = expected_codes(name, traffic.num_real[name])
        np.testing.assert_array_equal(codes, expected[:, : codes.shape[1]])
        if reason is planned:
            assert codes.shape == expected.shape, name
            assert bench.num_samples(name) == 2 * codes.shape[1]
    assert bench.scheduler.stats().kv_cache_usage == 0
    assert bench.worker.num_held == 0


def test_random_traffic_is_hard_enough(make_bench, make_request, rng):
    """The traffic above means little unless it preempts, hits the cache and pins and unpins."""
    bench = make_bench(num_blocks=14, block_size=8)
    traffic = _Traffic(bench, make_request, rng)
    num_pinned = set()
    for _ in range(200):
        if rng.random() < 0.3:
            traffic.arrive()
        bench.step()
        num_pinned.add(bench.scheduler.stats().num_pinned_blocks)
    bench.run_until_idle()
    stats = bench.scheduler.stats()
    assert num_pinned == {0, 1, 2, 3}
    assert stats.num_preemptions > 5
    assert stats.prefix_cache_hits > 100
