"""Load, client and figures against a made-up server: what is counted, and what is a failure."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from vllm.audio import encode_all, lookup
from vllm.benchmarks import (
    Load,
    Playback,
    Result,
    format_report,
    play,
    plot_point,
    run_load,
    summarize,
)
from vllm.benchmarks.client import Client, Settings, make_bodies

SETTINGS = Settings(base_url="http://server", max_tokens=(10, 20), seed=0)


class Chunks(httpx.AsyncByteStream):
    def __init__(self, chunks: Sequence[bytes], *, breaks: bool = False) -> None:
        self._chunks = chunks
        self._breaks = breaks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._chunks[0]
        if self._breaks:
            raise httpx.RemoteProtocolError("gone")
        for chunk in self._chunks[1:]:
            yield chunk


class FlakyServer(httpx.AsyncBaseTransport):
    """Every fourth reply is an error, every fourth breaks off, the others are half a second."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.num_open = self.max_open = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(await request.aread())
        index = len(self.bodies)
        self.bodies.append(body)
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        await asyncio.sleep(0)
        self.num_open -= 1
        if index % 4 == 3:
            return httpx.Response(503, json={"error": {"message": "come back later"}})
        stream = Chunks([bytes(12_000)] * 2, breaks=index % 4 == 2)
        return httpx.Response(200, headers={"X-Sample-Rate": "24000"}, stream=stream)


def measure(load: Load, server: FlakyServer) -> dict[str, Any]:
    async def go() -> dict[str, Any]:
        async with Client(SETTINGS, transport=server) as client:
            bodies = make_bodies(SETTINGS, 8)
            return await run_load(load, bodies, client.speak, seed=0, show_progress=False)

    return asyncio.run(go())


def speak(settings: Settings, reply: httpx.Response) -> tuple[Result, httpx.Request]:
    requests: list[httpx.Request] = []

    async def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return reply

    async def go() -> Result:
        async with Client(settings, transport=httpx.MockTransport(handle)) as client:
            return await client.speak(make_bodies(settings, 1)[0])

    return asyncio.run(go()), requests[0]


@pytest.mark.parametrize(
    "load", [Load(concurrency=3), Load(rate=10_000.0), Load(concurrency=2, rate=10_000.0)]
)
def test_every_request_is_sent_once_and_counted_once(load: Load) -> None:
    server = FlakyServer()
    point = measure(load, server)
    expected = make_bodies(SETTINGS, 8)
    assert sorted(map(str, server.bodies)) == sorted(map(str, expected))
    assert point["num_requests"] == 8
    assert point["num_failures"] == 4
    assert point["failures"] == {"RemoteProtocolError": 2, "status 503": 2}
    assert "status 503: come back later" in point["failure_examples"]
    assert point["audio_s"] == pytest.approx(4 * 0.5)
    assert server.max_open <= (load.concurrency or 8)


def test_bodies_repeat_with_the_seed_and_keep_the_limits() -> None:
    bodies = make_bodies(SETTINGS, 50)
    assert bodies == make_bodies(SETTINGS, 50)
    assert {body["response_format"] for body in bodies} == {"pcm"}
    assert all(10 <= body["max_tokens"] <= 20 for body in bodies)


def test_a_peer_gets_no_field_that_was_not_asked_for() -> None:
    settings = Settings(base_url="http://server", texts=("a", "b"), extra={"stream": True})
    assert make_bodies(settings, 3) == [
        {"input": text, "response_format": "pcm", "stream": True} for text in "aba"
    ]


def test_the_proxy_route_gets_its_own_body_and_answers_with_a_wav() -> None:
    settings = Settings(base_url="http://server/v1/", endpoint="generate", texts=("a",))
    wav = encode_all(np.zeros(36_000, np.float32), lookup("wav"), 24_000)
    reply = httpx.Response(200, stream=Chunks([wav[:44], wav[44:1000], wav[1000:]]))
    result, request = speak(settings, reply)
    assert request.url == "http://server/generate"
    assert json.loads(request.content) == {"text": "a"}
    assert result.failure is None
    assert len(result.arrivals) == 2  # the header is no audio
    assert result.audio_s == pytest.approx(1.5)


@pytest.mark.parametrize("name", ["mp3", "opus", "aac", "flac"])
def test_seconds_of_encoded_audio(name: str) -> None:
    data = encode_all(np.zeros(48_000, np.float32), lookup(name), 24_000)
    half = len(data) // 2
    reply = httpx.Response(200, stream=Chunks([data[:half], data[half:]]))
    result, _ = speak(Settings(base_url="http://server", response_format=name), reply)
    assert result.audio_s == pytest.approx(2.0, abs=0.15)
    assert len(result.arrivals) == 2


@pytest.mark.parametrize(
    ("reply", "kind", "detail"),
    [
        (httpx.Response(200), "no audio", ""),
        (httpx.Response(200, text="<html>"), "not audio", "ref_audio"),
        (httpx.Response(400, json={"detail": "Text cannot be empty"}), "status 400", "Text cannot"),
        (httpx.Response(500, text="oops"), "status 500", "oops"),
    ],
)
def test_what_is_no_audio_is_a_failure_that_says_why(
    reply: httpx.Response, kind: str, detail: str
) -> None:
    result, _ = speak(Settings(base_url="http://server", response_format="mp3"), reply)
    assert result.failure == kind
    assert detail in result.failure_detail


def test_the_key_is_sent_and_not_shown() -> None:
    settings = Settings(base_url="http://server", api_key="secret")
    _, request = speak(settings, httpx.Response(200, content=bytes(100)))
    assert request.headers["authorization"] == "Bearer secret"
    assert "secret" not in repr(settings)


def test_player_without_gaps_never_stalls() -> None:
    assert play([(1.0, 0.5), (1.5, 0.5), (1.6, 2.0), (3.9, 0.1)]) == Playback(0, 0.0)


def test_player_stalls_until_the_late_chunk() -> None:
    playback = play([(1.0, 0.25), (1.75, 0.25), (2.0, 0.25), (3.0, 1.0)])
    assert playback.num_underruns == 2
    assert playback.stalled_s == pytest.approx(0.5 + 0.75)


def test_player_without_audio() -> None:
    assert play([]) == Playback(0, 0.0)


def test_failed_requests_do_not_enter_the_figures() -> None:
    good = Result(((0.2, 1.0), (0.6, 1.0)), finished_s=1.0)
    bad = Result(((9.0, 1.0),), finished_s=9.0, failure="TimeoutError")
    point = summarize([good, bad], wall_s=2.0)
    assert point["time_to_first_audio_s"]["p99"] == pytest.approx(0.2)
    assert point["rtf"]["p50"] == pytest.approx(0.5)
    assert point["audio_s_per_s"] == pytest.approx(1.0)
    assert point["num_failures"] == 1


@pytest.mark.parametrize(("finished_s", "is_capable"), [(0.9, True), (1.1, False)])
def test_real_time_capable_means_faster_than_the_audio(finished_s: float, is_capable: bool) -> None:
    point = summarize([Result(((0.2, 1.0),), finished_s=finished_s)], wall_s=2.0)
    assert point["is_realtime_capable"] is is_capable


def test_nothing_successful_is_not_real_time_capable() -> None:
    assert not summarize([Result(failure="status 500")], wall_s=1.0)["is_realtime_capable"]


def test_report_shows_every_section_and_five_failures_at_most() -> None:
    results = [Result(((0.25, 1.0),), finished_s=0.5)]
    results += [Result(failure="status 503", failure_detail=f"no. {i}") for i in range(7)]
    point = {"load": {"name": "1"}, **summarize(results, wall_s=2.0)}
    text = format_report(point, {"server": "http://server"})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for expected in (
        "server: http://server",
        "P95: 250.0 ms",
        "P90: 0.500",
        "audio: 1.0 s",
        "XRT: 0.50 audio s per s",
        "underruns: 0 in 0 replies",
        "7 x status 503",
        "e.g. status 503: no. 4",
        "real-time capable: yes (P95 RTF < 1)",
    ):
        assert expected in lines
    assert text.count("e.g.") == 5


def test_plot_of_a_point_is_a_png(tmp_path: Path) -> None:
    for name, result in {"good": Result(((0.2, 1.0),), 1.0), "bad": Result(failure="x")}.items():
        point = {"load": {"name": "1"}, **summarize([result], wall_s=2.0)}
        plot_point(point, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
