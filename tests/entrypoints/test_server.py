"""Routes beside speech, keys, headers, and the states of the engine behind the server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from vllm.entrypoints.bosonai.api_server import _bind, _uvicorn_config
from vllm.entrypoints.bosonai.engine_host import EngineHost, HostState
from vllm.entrypoints.cli_args import parse_serve_args
from vllm.exceptions import ConfigError, InvalidRequestError

LIMIT_S = 100  # bounds a hang


def test_ready(live: Any) -> None:
    assert live.client.get("/health").json()["status"] == "ok"
    assert live.client.get("/ping").status_code == 200
    assert set(live.client.get("/version").json()) == {"version"}


def test_models(live: Any) -> None:
    cards = live.client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["tts-test", "tts-1"]
    assert cards[0]["max_model_len"] == 8192
    assert live.client.get("/v1/models/tts-1").json()["id"] == "tts-1"


def test_a_model_name_may_hold_slashes(start_server: Any) -> None:
    server = start_server(None, "--served-model-name", "org/name")
    assert server.client.get("/v1/models/org/name").json()["id"] == "org/name"


def test_models_without_a_download_say_what_they_are(live: Any, start_server: Any) -> None:
    assert "toy" in live.client.get("/v1/models").json()["data"][0]["description"]
    named = start_server(None, "--model", "higgs-audio-tiny")
    assert "toy" in named.client.get("/v1/models").json()["data"][0]["description"]
    random = start_server(None, "--model", "higgs-audio-random")
    assert "noise" in random.client.get("/v1/models").json()["data"][0]["description"]
    card = start_server(None, "--model", "some/model").client.get("/v1/models").json()["data"][0]
    assert "description" not in card


def test_voices(live: Any) -> None:
    voices = live.client.get("/v1/audio/voices").json()["voices"]
    assert [voice["id"] for voice in voices] == ["en_woman", "en_man", "de_man"]


def test_replies_do_not_wait_until_their_first_packet_is_acknowledged() -> None:
    async def delays() -> list[int]:
        seen: asyncio.Queue[int] = asyncio.Queue()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            seen.put_nowait(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = _bind(parse_serve_args(["--host", "127.0.0.1", "--port", "0"]))
        async with await asyncio.start_server(accept, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            async with asyncio.timeout(LIMIT_S):
                return [await seen.get()]

    assert asyncio.run(delays()) == [1]


def test_idle_connections_outlast_those_of_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    app, args = FastAPI(), parse_serve_args([])
    assert _uvicorn_config(app, args).timeout_keep_alive > 60, "of proxies"
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "2.5")
    assert _uvicorn_config(app, args).timeout_keep_alive == 3


def test_loading(start_server: Any, fake_engine: Any) -> None:
    engine = fake_engine()
    engine.may_start.clear()
    server = start_server(engine, wait_ready=False)
    health = server.client.get("/health")
    assert (health.status_code, health.json()["error"]["code"]) == (503, "overloaded")
    assert health.headers["retry-after"] == "2"
    assert server.client.get("/ping").status_code == 204
    assert server.client.get("/v1/models").status_code == 200
    assert server.client.get("/v1/audio/voices").status_code == 503
    assert server.client.post("/v1/audio/speech", json={"input": "a"}).status_code == 503
    engine.may_start.set()


def test_an_engine_that_cannot_start(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(start_error=RuntimeError("no memory")), wait_ready=False)
    assert server.fatal.wait(LIMIT_S)
    assert server.host.state is HostState.DEAD
    assert server.client.get("/health").status_code == 503
    assert server.client.get("/ping").status_code == 503


@pytest.mark.parametrize(
    ("error", "has_traceback"), [(KeyError("odd"), True), (ConfigError("no memory"), False)]
)
def test_what_went_wrong_at_the_start_is_logged(
    start_server: Any,
    fake_engine: Any,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    has_traceback: bool,
) -> None:
    server = start_server(fake_engine(start_error=error), wait_ready=False)
    assert server.fatal.wait(LIMIT_S)
    (record,) = [r for r in caplog.records if "could not be started" in r.getMessage()]
    assert bool(record.exc_info) == has_traceback


def test_the_engines_death(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(holds_at=1))
    body = {"input": "a" * 50, "response_format": "pcm"}
    with server.client.stream("POST", "/v1/audio/speech", json=body) as reply:
        pieces = reply.iter_raw()
        next(pieces)
        server.engine.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            list(pieces)
    assert server.fatal.wait(LIMIT_S)
    assert server.client.get("/health").json()["error"]["code"] == "engine_dead"
    assert server.client.post("/v1/audio/speech", json={"input": "a"}).status_code == 503


def test_a_dead_engine_is_replaced_where_asked(fake_engine: Any) -> None:
    engines = [fake_engine(), fake_engine()]
    waiting = iter(engines)
    host = EngineHost(lambda: next(waiting), restart=True)

    async def scenario() -> None:
        running = asyncio.create_task(host.run())
        while host.state is not HostState.READY:
            await asyncio.sleep(0.005)
        engines[0].kill()
        assert host.state is HostState.LOADING
        while host.state is not HostState.READY:
            await asyncio.sleep(0.005)
        assert host.engine is engines[1]
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(scenario())


@pytest.mark.parametrize("restart", [False, True])
def test_an_engine_that_is_closed_did_not_die(fake_engine: Any, restart: bool) -> None:
    engines, deaths = [fake_engine(), fake_engine()], []
    waiting = iter(engines)
    host = EngineHost(
        lambda: next(waiting), restart=restart, on_fatal=lambda: deaths.append("fatal")
    )

    async def scenario() -> None:
        running = asyncio.create_task(host.run())
        while host.state is not HostState.READY:
            await asyncio.sleep(0.005)
        await host.close()
        engines[0].kill()
        assert host.state is HostState.DEAD
        await running

    asyncio.run(scenario())
    assert deaths == []
    assert host.engine is engines[0]


def test_keys(start_server: Any) -> None:
    server = start_server(None, "--api-key", "one", "two")
    good = [{"Authorization": f"Bearer {key}"} for key in ("one", "two")]
    bad = [{}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}]
    statuses = [server.client.get("/v1/models", headers=h).status_code for h in good + bad]
    assert statuses == [200, 200, 401, 401, 401]
    reply = server.client.post("/v1/audio/speech", content=b"x")
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.headers["x-request-id"]


def test_open_routes_need_no_key(start_server: Any) -> None:
    server = start_server(None, "--api-key", "one")
    for path in ("/health", "/ping", "/version", "/metrics", "/docs", "/openapi.json"):
        assert server.client.get(path).status_code == 200


def test_the_key_may_come_from_the_environment(
    start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server = start_server()
    assert server.client.get("/v1/models").status_code == 401


def test_a_refused_request_has_cors_headers_too(start_server: Any) -> None:
    server = start_server(None, "--api-key", "one")
    reply = server.client.get("/v1/models", headers={"Origin": "http://page"})
    assert reply.headers["access-control-allow-origin"] == "*"
    exposed = reply.headers["access-control-expose-headers"]
    assert "X-Seed" in exposed
    assert "X-Finish-Reason" in exposed


def test_preflight_needs_no_key(start_server: Any) -> None:
    server = start_server(None, "--api-key", "one")
    headers = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    assert server.client.options("/v1/audio/speech", headers=headers).status_code == 200


def test_origins_can_be_limited(start_server: Any) -> None:
    server = start_server(None, "--allowed-origins", '["http://mine"]')
    reply = server.client.get("/health", headers={"Origin": "http://page"})
    assert "access-control-allow-origin" not in reply.headers


def test_the_documentation_can_be_hidden(start_server: Any) -> None:
    server = start_server(None, "--disable-fastapi-docs")
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert server.client.get(path).status_code == 404


def test_a_prefix_stripped_by_a_proxy(start_server: Any) -> None:
    server = start_server(None, "--root-path", "/tts", "--api-key", "one")
    assert server.client.get("/v1/models").status_code == 401
    key = {"Authorization": "Bearer one"}
    assert server.client.get("/v1/models", headers=key).status_code == 200
    assert server.client.get("/openapi.json").json()["servers"] == [{"url": "/tts"}]


def test_foreign_middleware(start_server: Any) -> None:
    server = start_server(None, "--middleware", "starlette.middleware.gzip.GZipMiddleware")
    reply = server.client.get("/openapi.json", headers={"Accept-Encoding": "gzip"})
    assert reply.headers["content-encoding"] == "gzip"


def test_openapi_tells_the_truth(live: Any) -> None:
    document = live.client.get("/openapi.json").json()
    post = document["paths"]["/v1/audio/speech"]["post"]
    assert {"200", "400", "401", "404", "413", "415", "429", "500", "503"} <= set(post["responses"])
    assert "audio/mpeg" in post["responses"]["200"]["content"]
    fields = document["components"]["schemas"]["AudioSpeechRequest"]
    assert fields["required"] == ["input"]
    assert {"ras_win_len", "max_completion_tokens", "ref_audio"} <= set(fields["properties"])


def test_metrics_count_requests(start_server: Any) -> None:
    server = start_server()
    server.client.post("/v1/audio/speech", json={"input": "ab"})
    page = server.client.get("/metrics").text
    assert 'vllm:request_success_total{finished_reason="stop",model_name="tts-test"} 1.0' in page
    assert 'vllm:audio_seconds_total{model_name="tts-test"} 0.16' in page


def test_metrics_do_not_count_refused_requests(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(fail_before=InvalidRequestError("no", param="input")))
    assert server.client.post("/v1/audio/speech", json={"input": "ab"}).status_code == 400
    server.engine.fail_before = RuntimeError("broken")
    assert server.client.post("/v1/audio/speech", json={"input": "ab"}).status_code == 500
    page = server.client.get("/metrics").text
    counted = [line for line in page.splitlines() if line.startswith("vllm:request_success_total")]
    assert [line for line in counted if not line.endswith(" 0.0")] == [
        'vllm:request_success_total{finished_reason="error",model_name="tts-test"} 1.0'
    ]
