"""The virtual player, on times that the tests make up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.player import VirtualPlayer


def play(*arrivals: tuple[float, float], speed: float = 1.0) -> VirtualPlayer:
    player = VirtualPlayer(speed)
    for now, audio_s in arrivals:
        player.feed(now, audio_s)
    return player


def test_waiting_for_the_first_audio_is_no_underrun() -> None:
    player = play((7.0, 1.0))
    assert player.has_started
    assert player.stalls_s == []


def test_audio_in_time_keeps_the_player_going() -> None:
    assert play((0.0, 1.0), (0.9, 1.0), (2.0, 1.0)).stalls_s == []


def test_a_late_piece_is_one_underrun_of_the_missing_time() -> None:
    assert play((0.0, 1.0), (1.25, 1.0), (2.0, 1.0)).stalls_s == [0.25]


def test_after_a_stall_the_player_goes_on_from_the_late_piece() -> None:
    assert play((0.0, 1.0), (3.0, 1.0), (4.5, 1.0)).stalls_s == [2.0, 0.5]


def test_a_fast_listener_needs_audio_sooner() -> None:
    arrivals = ((0.0, 1.0), (0.75, 1.0))
    assert play(*arrivals).stalls_s == []
    assert play(*arrivals, speed=2.0).stalls_s == [0.25]
    assert play((0.0, 1.0), (1.75, 1.0), speed=0.5).stalls_s == []


def test_nothing_is_not_audio() -> None:
    player = play((1.0, 0.0))
    assert not player.has_started
    player.feed(2.0, 1.0)
    player.feed(9.0, 0.0)
    player.end()
    assert player.stalls_s == []


def test_an_empty_buffer_after_the_end_is_no_underrun() -> None:
    player = play((0.0, 1.0))
    player.end()
    player.leave(50.0)
    assert player.stalls_s == []


def test_leaving_in_silence_counts_once() -> None:
    player = play((0.0, 1.0))
    player.leave(1.5)
    player.leave(9.0)
    assert player.stalls_s == [0.5]


def test_leaving_amid_the_audio_or_before_any_counts_nothing() -> None:
    early, never = play((0.0, 1.0)), play()
    early.leave(0.5)
    never.leave(9.0)
    assert early.stalls_s == never.stalls_s == []


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_playing_and_stalling_fill_the_time(steps: list[tuple[int, int]], speed: float) -> None:
    """From the first audio to the last second played, the player plays or stalls."""
    player, now, first, played = VirtualPlayer(speed), 0.0, None, 0.0
    for wait, audio in steps:
        now += wait
        player.feed(now, float(audio))
        played += audio / speed
        first = now if first is None and audio else first
    if first is None:
        assert not player.has_started
        return
    end = first + played + sum(player.stalls_s)
    player.leave(end + 3.0)
    assert player.stalls_s[-1] == pytest.approx(3.0)
