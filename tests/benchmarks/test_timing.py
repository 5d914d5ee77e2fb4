"""Rivals take turns, and the first round warms up."""

from __future__ import annotations

import pytest

from benchmarks._timing import interleave, ratio


def test_rivals_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    rivals = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = interleave(rivals, num_rounds=3, title="turns")
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratio_is_the_median_of_the_rounds() -> None:
    assert ratio([2.0, 30.0, 4.0], [1.0, 1.0, 1.0]) == pytest.approx(4.0)
