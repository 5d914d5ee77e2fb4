"""The clients of ``benchmarks.player_deadlines`` and the figures that are made of them."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import player_deadlines
from benchmarks.player_deadlines import Client, Settings, compare, make_clients, summarize
from vllm.outputs import FinishReason
from vllm.v1.engine.messages import EngineCoreOutput

RATE = 1000
INFO: Any = SimpleNamespace(sample_rate=RATE)
FRAMES = (20, 30)


def make_client(*, listens: bool) -> Client:
    return Client("c0", random.Random(1), listens, due=0.0)


def hear(client: Client, now: float, seconds: float, reason: FinishReason | None = None) -> None:
    assert client.request_id is not None
    audio = bytes(4 * int(seconds * RATE))
    client.take(EngineCoreOutput(client.request_id, audio=audio, finish_reason=reason), now, INFO)


def test_a_listener_hears_the_reply_out_before_asking_again() -> None:
    client = make_client(listens=True)
    request = client.next_request(10.0, FRAMES)
    assert request is not None
    assert request.listener is not None
    assert request.listener.dry_at == request.arrival_time == 10.0
    assert 20 <= request.frame_limit <= 30
    hear(client, 11.0, 1.0)
    hear(client, 12.5, 2.0, FinishReason.LENGTH)
    assert client.stalls_s == [0.5]
    assert client.first_audio_s == [1.0]
    assert client.next_request(14.4, FRAMES) is None
    assert client.next_request(14.5, FRAMES) is not None


def test_others_ask_again_at_once_and_are_no_listeners() -> None:
    client = make_client(listens=False)
    request = client.next_request(10.0, FRAMES)
    assert request is not None
    assert request.listener is None
    hear(client, 12.0, 1.0, FinishReason.LENGTH)
    assert client.latencies_s == [2.0]
    assert client.next_request(12.0, FRAMES) is not None


def test_an_unfinished_wait_is_counted() -> None:
    waiting, stalling = make_client(listens=True), make_client(listens=True)
    for client in (waiting, stalling):
        client.next_request(0.0, FRAMES)
    hear(stalling, 1.0, 1.0)
    for client in (waiting, stalling):
        client.leave(5.0)
    figures = summarize([waiting, stalling], 10.0)
    assert waiting.first_audio_s == [5.0]
    assert (figures["num_underruns"], figures["stalled_s"]) == (1, 3.0)
    assert figures["silent_s"] == 5.0 + 1.0 + 3.0
    assert figures["heard_s_per_s"] == figures["audio_s_per_s"] == 0.1
    assert figures["others_s_per_s"] == 0.0


def test_the_same_seed_makes_the_same_requests() -> None:
    settings = Settings(num_listeners=2, num_others=3, num_frames=FRAMES, seconds=1.0)

    def limits() -> list[int]:
        clients = make_clients(settings, seed=4).values()
        assert [client.listens for client in clients] == [True, True, False, False, False]
        requests = [client.next_request(client.due, FRAMES) for client in clients]
        return [request.frame_limit for request in requests if request is not None]

    assert limits() == limits()


def test_ratios_are_taken_round_by_round() -> None:
    names = player_deadlines.FIGURES
    rounds = [
        {"off": dict.fromkeys(names, base), "on": dict.fromkeys(names, base * ratio)}
        for base, ratio in ((1.0, 0.5), (10.0, 0.2), (100.0, 0.4))
    ]
    result = compare(rounds)
    assert result["ratios"]["stalled_s"] == pytest.approx(0.4)
    assert result["medians"]["off"]["stalled_s"] == 10.0
    for figures in rounds:
        figures["off"]["stalled_s"] = 0.0
    assert compare(rounds)["ratios"]["stalled_s"] is None


def test_without_turns_every_step_is_over_all_rows() -> None:
    turns = player_deadlines.NoTurns(0.04)
    turns.record(10.0)  # as on a saturated device
    assert turns.choose([], now=0.0) is None
    assert turns.is_whole
