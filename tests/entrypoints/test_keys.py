"""Keys from everywhere, the routes they guard, limits per key, and logs that tell neither."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from vllm.entrypoints.bosonai.api_server import build_app
from vllm.entrypoints.bosonai.engine_host import EngineHost
from vllm.entrypoints.bosonai.middleware import OPEN_PATHS
from vllm.entrypoints.cli_args import parse_serve_args

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
    engine = fake_engine(delay_s=0.02)
    server = start_server(engine, "--api-key", "one", "--max-requests-per-key", "1")
    long = {**SPEECH, "input": "a" * 400}
    with server.client.stream("POST", "/v1/audio/speech", json=long, headers=KEY) as reply:
        pieces = reply.iter_raw()  # kept: a generator that is dropped closes the reply
        next(pieces)
        refused = httpx.post(f"{server.url}/v1/audio/speech", json=SPEECH, headers=KEY)
        assert refused.status_code == 429, refused.text[:200]
        assert refused.headers["retry-after"] == "1"
    waiting = threading.Event()
    while server.client.post("/v1/audio/speech", json=SPEECH, headers=KEY).status_code == 429:
        waiting.wait(0.01)


def test_neither_keys_nor_texts_are_logged(
    start_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(None, "--api-key", "one-secret-key")
    logging.getLogger("vllm").addHandler(caplog.handler)
    headers = {"Authorization": "Bearer one-secret-key"}
    with caplog.at_level(logging.DEBUG, logger="vllm"):
        for body in ({"input": "a secret text", "odd": 1}, {"input": "a secret text", "speed": 9}):
            server.client.post("/v1/audio/speech", json=body, headers=headers)
    logging.getLogger("vllm").removeHandler(caplog.handler)
    assert "odd" in caplog.text
    assert "secret" not in caplog.text
