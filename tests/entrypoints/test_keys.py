"""Keys from everywhere, the routes they guard, limits per key, and logs that tell neither."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.responses import PlainTextResponse

from vllm.entrypoints.bosonai.api_server import build_app
from vllm.entrypoints.bosonai.engine_host import EngineHost
from vllm.entrypoints.bosonai.middleware import OPEN_PATHS, KeyLimitMiddleware
from vllm.entrypoints.cli_args import parse_serve_args
from vllm.exceptions import EngineError

KEY = {"Authorization": "Bearer one"}
SPEECH = {"input": "Hi.", "response_format": "pcm"}


def test_every_other_route_needs_a_key(start_server: Any, fake_engine: Any) -> None:
    server = start_server(None, "--api-key", "one")
    routes = build_app(parse_serve_args([]), EngineHost(fake_engine)).routes
    guarded = [r for r in routes if isinstance(r, APIRoute) and r.path not in OPEN_PATHS]
    assert len(guarded) > 10
    for route in guarded:
        for method in route.methods:
            assert server.client.request(method, route.path).status_code == 401, route.path
    assert server.client.get("/nowhere").status_code == 401
    assert server.client.get("/v1/../health/").status_code == 401


def test_keys_of_a_file(start_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\n\n  two \nthree\n")
    server = start_server(None, "--api-key", "one", "--api-key-file", str(path))
    for key, status in (("one", 200), ("two", 200), ("three", 200), ("# of the team", 401)):
        headers = {"Authorization": f"Bearer {key}"}
        assert server.client.get("/v1/models", headers=headers).status_code == status


def test_several_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "one, two,")
    assert parse_serve_args([]).server.keys == ("one", "two")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--api-key", ""], "must not be empty"),
        (["--api-key-file", "nowhere"], "cannot be read"),
        (["--requests-per-minute", "5"], "need keys"),
    ],
)
def test_wrong_flags(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_serve_args(flags)
    assert words in capsys.readouterr().err


def test_requests_per_minute(start_server: Any) -> None:
    server = start_server(None, "--api-key", "one", "two", "--requests-per-minute", "2")
    replies = [server.client.post("/v1/audio/speech", json=SPEECH, headers=KEY) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert 0 < int(replies[2].headers["retry-after"]) <= 60
    assert replies[2].json()["error"]["type"] == "rate_limit_error"
    other = {"Authorization": "Bearer two"}
    assert server.client.post("/v1/audio/speech", json=SPEECH, headers=other).status_code == 200
    assert server.client.get("/v1/models", headers=KEY).status_code == 200


def test_requests_at_once(start_server: Any, fake_engine: Any) -> None:
    engine = fake_engine(holds_at=1)
    server = start_server(engine, "--api-key", "one", "--max-requests-per-key", "1")
    long = {**SPEECH, "input": "a" * 40}
    with server.client.stream("POST", "/v1/audio/speech", json=long, headers=KEY) as reply:
        pieces = reply.iter_raw()  # kept: a generator that is dropped closes the reply
        next(pieces)
        refused = server.client.post("/v1/audio/speech", json=SPEECH, headers=KEY)
        assert refused.status_code == 429, refused.text[:200]
        assert refused.headers["retry-after"] == "1"
        wish = {"request_id": reply.headers["x-request-id"]}
        assert server.client.post("/cancel", json=wish, headers=KEY).status_code == 200
    engine.go_on.set()
    server.wait_until(
        lambda: server.client.post("/v1/audio/speech", json=SPEECH, headers=KEY).status_code == 200
    )


def test_a_request_right_after_a_reply_is_not_one_too_many() -> None:
    headers = [(b"authorization", b"Bearer one")]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    statuses: list[int] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
        elif not message.get("more_body") and len(statuses) == 1:
            await limited(scope, receive, send)  # before the first has returned

    async def receive() -> Any:
        raise AssertionError("nothing reads the body")

    limited = KeyLimitMiddleware(PlainTextResponse("Hi."), per_minute=0, at_once=1)
    asyncio.run(limited(scope, receive, send))
    assert statuses == [200, 200]


SECRETS = {
    "/v1/audio/speech": {"input": "a secret text", "instructions": "a secret wish", "odd": 1},
    "/v1/audio/speech/batch": {"items": [{"input": "a secret text"}, {"input": ""}]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a secret text"}]},
    "/generate": {"text": "a secret text", "system_prompt": "a secret wish"},
    "/generate/batch": [{"text": "a secret text"}],
}
SECRET_KEY = {"Authorization": "Bearer one-secret-key"}


class Log(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def text(self) -> str:
        return "\n".join(record.getMessage() for record in self.records)

    def lines(self, count: int) -> list[dict[str, str]]:
        """Fields of so many lines of requests; they are written after the replies."""
        until = time.monotonic() + 100  # bounds a hang
        while len(found := [r for r in self.records if r.name == "vllm.requests"]) < count:
            assert time.monotonic() < until, self.text()
            time.sleep(0.005)
        assert len(found) == count
        return [
            {"id": r.request_id, **dict(re.findall(r'(\w+)=(".*"|\S+)', r.getMessage()))}
            for r in found
        ]


@pytest.fixture
def log() -> Iterator[Log]:
    """What the package and the HTTP server log, down to debug."""
    handler = Log()
    loggers = [logging.getLogger(name) for name in ("vllm", "uvicorn", "uvicorn.access")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield handler
    for logger, level in zip(loggers, before, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def send_secrets(server: Any) -> None:
    for path, body in SECRETS.items():
        server.client.post(path, json=body, headers=SECRET_KEY)
        wrong = {"input": "a secret text", "speed": 9, "text": "a secret text", "top_k": 1000}
        server.client.post(path, json=wrong, headers=SECRET_KEY)
        broken = {**SECRET_KEY, "Content-Type": "application/json"}
        server.client.post(path, content=b'{"input": "a secret', headers=broken)
        server.client.post(path, json=body, headers={"Authorization": "Bearer wrong-secret"})
    server.client.get("/v1/models", headers={"X-Api-Key": "one-secret-key"})


@pytest.mark.parametrize("flags", [(), ("--enable-log-requests",)])
def test_neither_keys_nor_texts_are_logged(
    start_server: Any, log: Log, flags: tuple[str, ...]
) -> None:
    send_secrets(start_server(None, "--api-key", "one-secret-key", *flags))
    if flags:
        log.lines(4 * len(SECRETS))
    assert "odd" in log.text()
    assert "secret" not in log.text()


def test_requests_are_logged_by_line(start_server: Any, log: Log) -> None:
    server = start_server(None, "--log-requests")
    body = {"input": "Hello.", "seed": 5, "voice": "onyx", "request_id": "mine"}
    assert server.client.post("/v1/audio/speech", json=body).status_code == 200
    (line,) = log.lines(1)
    assert {name: line.pop(name) for name in ("seconds", "queue_seconds", "first_audio_seconds")}
    assert line == {
        "id": "mine",
        "route": "/v1/audio/speech",
        "status": "200",
        "voice": "en_man",
        "characters": "6",
        "seed": "5",
        "finish_reason": "stop",
        "audio_seconds": "0.48",
    }


def test_refused_requests_are_logged_too(start_server: Any, log: Log) -> None:
    server = start_server(None, "--enable-log-requests", "--api-key", "one")
    headers = {"Authorization": "Bearer one"}
    server.client.post("/v1/audio/speech", json={"input": ""}, headers=headers)
    server.client.post("/v1/audio/speech", json={"input": "Hi."})
    server.client.post("/no%0Awhere", json={}, headers=headers)
    assert [(line["route"], line["status"]) for line in log.lines(3)] == [
        ("/v1/audio/speech", "400"),
        ('"/v1/audio/speech"', "401"),
        ('"/no\\nwhere"', "404"),
    ]


def test_each_text_of_a_batch_has_a_line(start_server: Any, log: Log) -> None:
    server = start_server(None, "--enable-log-requests")
    items = [{"input": "One."}, {"input": "Three."}]
    server.client.post("/v1/audio/speech/batch", json={"items": items})
    assert sorted(line["characters"] for line in log.lines(2)) == ["4", "6"]


@pytest.mark.parametrize(
    ("length", "shown"), [("0", None), ("4", '"A\\n\\"b…"'), ("99", '"A\\n\\"b c"')]
)
def test_texts_are_logged_as_far_as_asked_for(
    start_server: Any, log: Log, length: str, shown: str | None
) -> None:
    server = start_server(None, "--enable-log-requests", "--max-log-len", length)
    server.client.post("/v1/audio/speech", json={"input": 'A\n"b c'})
    assert [line.get("text") for line in log.lines(1)] == [shown]


def test_a_reply_that_breaks_off_is_logged_as_incomplete(
    start_server: Any, fake_engine: Any, log: Log
) -> None:
    server = start_server(fake_engine(fail_after=EngineError("broken")), "--enable-log-requests")
    with pytest.raises(httpx.RemoteProtocolError):
        server.client.post("/v1/audio/speech", json={"input": "Hello."})
    (line,) = log.lines(1)
    assert (line["status"], line["finish_reason"], line["audio_seconds"]) == (
        "200",
        "incomplete",
        "0.16",
    )
