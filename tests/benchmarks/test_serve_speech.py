"""The load program against a made-up server: what it counts and what it calls a failure."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from benchmarks.serve_speech import (
    Client,
    Load,
    Playback,
    Result,
    Settings,
    main,
    make_bodies,
    play,
    plot,
    run_load,
    summarize,
)

SETTINGS = Settings(base_url="http://server", max_tokens=(10, 20))


class Pcm(httpx.AsyncByteStream):
    """Half a second of silence in two chunks."""

    def __init__(self, *, breaks: bool = False) -> None:
        self._breaks = breaks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield bytes(12_000)
        if self._breaks:
            raise httpx.RemoteProtocolError("gone")
        yield bytes(12_000)


class Server(httpx.AsyncBaseTransport):
    """Every fourth reply is an error, every fourth breaks off, the others are whole."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(await request.aread())
        index = len(self.bodies)
        self.bodies.append(body)
        await asyncio.sleep(0)
        if index % 4 == 3:
            return httpx.Response(503)
        stream = Pcm(breaks=index % 4 == 2)
        return httpx.Response(200, headers={"X-Sample-Rate": "24000"}, stream=stream)


def measure(load: Load, server: Server) -> dict[str, Any]:
    async def go() -> dict[str, Any]:
        async with Client(SETTINGS, transport=server) as client:
            return await run_load(load, SETTINGS, client, show_progress=False)

    return asyncio.run(go())


@pytest.mark.parametrize("load", [Load(8, concurrency=3), Load(8, rate=10_000.0)])
def test_every_request_is_sent_once_and_counted_once(load: Load) -> None:
    server = Server()
    point = measure(load, server)
    expected = make_bodies(SETTINGS, 8)
    assert sorted(map(str, server.bodies)) == sorted(map(str, expected))
    assert point["num_requests"] == 8
    assert point["num_failures"] == 4
    assert point["failures"] == {"RemoteProtocolError": 2, "status 503": 2}
    assert point["audio_s"] == pytest.approx(4 * 0.5)


def test_bodies_repeat_with_the_seed_and_keep_the_limits() -> None:
    bodies = make_bodies(SETTINGS, 50)
    assert bodies == make_bodies(SETTINGS, 50)
    assert {body["response_format"] for body in bodies} == {"pcm"}
    assert all(10 <= body["max_tokens"] <= 20 for body in bodies)


def test_player_without_gaps_never_stalls() -> None:
    assert play([(1.0, 0.5), (1.5, 0.5), (1.6, 2.0), (3.9, 0.1)]) == Playback(0, 0.0)


def test_player_stalls_until_the_late_chunk() -> None:
    playback = play([(1.0, 0.25), (1.75, 0.25), (2.0, 0.25), (3.0, 1.0)])
    assert playback.num_underruns == 2
    assert playback.stalled_s == pytest.approx(0.5 + 0.75)


def test_player_without_audio() -> None:
    assert play([]) == Playback(0, 0.0)


def test_failed_requests_do_not_enter_the_figures() -> None:
    good = Result(0.0, [(0.2, 1.0), (0.6, 1.0)], finished_s=1.0)
    bad = Result(0.0, [(9.0, 1.0)], finished_s=9.0, failure="TimeoutError")
    point = summarize([good, bad], wall_s=2.0)
    assert point["time_to_first_audio_s"]["p99"] == pytest.approx(0.2)
    assert point["rtf"]["p50"] == pytest.approx(0.5)
    assert point["audio_s_per_s"] == pytest.approx(1.0)
    assert point["num_failures"] == 1


def test_plot_is_a_png(tmp_path: Any) -> None:
    good = summarize([Result(0.0, [(0.2, 1.0)], finished_s=1.0)], wall_s=2.0)
    failed = summarize([Result(0.0, failure="status 500")], wall_s=2.0)
    points = [{"load": {"name": "1"}, **good}, {"load": {"name": "2"}, **failed}]
    plot(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_absent_server_is_one_line_and_status_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-url", "http://127.0.0.1:9", "--num-requests", "1"]) == 1
    assert "does not serve" in capsys.readouterr().err


def test_bad_load_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rate", "0"])
    assert "--rate" in capsys.readouterr().err
