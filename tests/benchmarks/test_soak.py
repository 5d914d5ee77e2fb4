"""The soak program: its verdict, and a short form of it against the real server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.soak import Manner, Outcome, Turn, count_overtaken, run

PASSED = Outcome(
    duration_s=60.0,
    ended={Manner.READ: 10},
    refused={"status 503": 3},
    failures={},
    num_left_open=0,
    kv_cache_usage=0.0,
    num_pairs=5,
    num_overtaken=0,
    longest_look_s=0.01,
    memory_mib=(500.0, 1000.0, 1100.0, 1010.0),
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
        ({"num_pairs": 0}, "their order is not known"),
        ({"num_overtaken": 1}, "1 of 5 pairs in the wrong order"),
        ({"memory_mib": (500.0, 1000.0, 1060.0)}, "grew by 6.0%"),
    ],
)
def test_what_is_complained_about(change: dict[str, object], complaint: str) -> None:
    (found,) = replace(PASSED, **change).complaints
    assert complaint in found


def test_order_of_requests() -> None:
    first = Turn(0, sent_at=0.0, queued_at=2.0, answered_at=9.0)
    second = Turn(0, sent_at=3.0, queued_at=3.5, answered_at=4.0)
    assert count_overtaken([first, second]) == (1, 1)
    assert count_overtaken([first, replace(second, answered_at=10.0)]) == (1, 0)
    assert count_overtaken([first, replace(second, answered_at=8.5)]) == (1, 0)  # began earlier?
    assert count_overtaken([first, replace(second, sent_at=1.0)]) == (0, 0)  # who was there first?
    assert count_overtaken([replace(first, answered_at=2.5), second]) == (0, 0)  # never together
    assert count_overtaken([first, second], gap_s=20.0) == (1, 0)  # on a starved machine
    assert count_overtaken([first, replace(second, priority=-1)]) == (0, 0)  # it may overtake
    assert count_overtaken([replace(first, priority=-1), second]) == (1, 1)


def test_one_minute_of_two_hundred_clients() -> None:
    outcome = run(num_clients=200, duration_s=60.0, show_progress=False)
    assert set(outcome.ended) == set(Manner)
    # Memory still settles in so short a run; all else holds from the start.
    assert outcome.memory_growth < 0.25
    assert not replace(outcome, memory_mib=PASSED.memory_mib).complaints
