"""The soak program: its verdict, and a short form of it against the real server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.soak import Manner, Outcome, run

PASSED = Outcome(
    duration_s=60.0,
    ended={Manner.READ: 10},
    refused={"status 503": 3},
    failures={},
    num_left_open=0,
    kv_cache_usage=0.0,
    memory_mib=(1000.0, 1010.0),
    memory_growth=0.01,
)


def test_refusals_are_no_complaint() -> None:
    assert not PASSED.complaints


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"failures": {"read: ReadError": 2}}, "2 x read: ReadError"),
        ({"ended": {Manner.LEAVE_EARLY: 9}}, "no request was read"),
        ({"num_left_open": 1}, "1 requests still open"),
        ({"kv_cache_usage": 0.01}, "1.00% of the KV cache"),
        ({"memory_growth": 0.06}, "grew by 6.0%"),
    ],
)
def test_what_is_complained_about(change: dict[str, object], complaint: str) -> None:
    (found,) = replace(PASSED, **change).complaints
    assert complaint in found


@pytest.mark.slow
def test_ten_seconds_of_two_hundred_clients() -> None:
    outcome = run(num_clients=200, duration_s=10.0, show_progress=False)
    assert set(outcome.ended) == set(Manner)
    # The memory of so short a run still settles; all else holds from the start.
    assert not replace(outcome, memory_growth=0.0).complaints
