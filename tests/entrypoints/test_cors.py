"""Browsers of other origins: who is let in, with what, and which headers they may read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from vllm.entrypoints.bosonai.api_server import EXPOSED_HEADERS

ORIGIN = "https://player.example"
SPEECH = {"input": "Hi.", "response_format": "pcm"}
# Scripts may read these of any reply (the Fetch standard's safelist).
SAFELISTED = {
    *("cache-control", "content-language", "content-length", "content-type"),
    *("expires", "last-modified", "pragma"),
}
# Of the connection, and of CORS itself.
NOT_FOR_SCRIPTS = {"date", "server", "connection", "transfer-encoding", "vary"}


def preflight(server: Any, **headers: str) -> httpx.Response:
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-request-id",
    }
    reply: httpx.Response = server.client.options("/v1/audio/speech", headers={**asked, **headers})
    return reply


def get(server: Any, origin: str = ORIGIN, **headers: str) -> httpx.Response:
    reply: httpx.Response = server.client.get("/v1/models", headers={"Origin": origin, **headers})
    return reply


def test_any_origin_may_ask_by_default(live: Any) -> None:
    assert get(live).headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in get(live).headers
    reply = preflight(live)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == "*"
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "authorization" in reply.headers["access-control-allow-headers"].lower()


def test_streams_may_be_read_by_other_origins(live: Any) -> None:
    reply = live.client.post("/v1/audio/speech", json=SPEECH, headers={"Origin": ORIGIN})
    assert reply.headers["access-control-allow-origin"] == "*"


def test_only_the_origins_allowed(start_server: Any) -> None:
    server = start_server(None, "--allowed-origins", f'["{ORIGIN}"]')
    assert get(server).headers["access-control-allow-origin"] == ORIGIN
    assert "origin" in get(server).headers["vary"].lower()
    assert preflight(server).headers["access-control-allow-origin"] == ORIGIN
    for other in ("https://evil.example", f"{ORIGIN}.evil.example", "http://player.example"):
        assert "access-control-allow-origin" not in get(server, other).headers
        refused = preflight(server, Origin=other)
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers


def test_only_the_methods_and_headers_allowed(start_server: Any) -> None:
    flags = ("--allowed-methods", '["GET"]', "--allowed-headers", '["X-Request-Id"]')
    server = start_server(None, *flags)
    only_id = {"Access-Control-Request-Headers": "x-request-id"}
    as_get = {"Access-Control-Request-Method": "GET"}
    assert preflight(server, **only_id).status_code == 400
    assert preflight(server, **as_get).status_code == 400
    assert preflight(server, **as_get, **only_id).status_code == 200


def test_credentials_only_where_allowed(start_server: Any) -> None:
    origins = ("--allowed-origins", f'["{ORIGIN}"]')
    server = start_server(None, *origins, "--allow-credentials")
    assert get(server, Cookie="a=b").headers["access-control-allow-credentials"] == "true"
    assert preflight(server).headers["access-control-allow-credentials"] == "true"


def test_a_preflight_needs_no_key_and_refusals_can_be_read(start_server: Any) -> None:
    server = start_server(None, "--api-key", "one")
    assert preflight(server).status_code == 200
    refused = get(server)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "*"
    assert "WWW-Authenticate" in refused.headers["access-control-expose-headers"]
    assert get(server, Authorization="Bearer one").status_code == 200


def replies(server: Any) -> list[httpx.Response]:
    """One reply of each kind."""
    post = server.client.post
    chat = {"messages": [{"role": "user", "content": "Hi."}]}
    origin = {"Origin": ORIGIN}
    return [
        post("/v1/audio/speech", json=SPEECH, headers=origin),
        post("/v1/audio/speech", json={**SPEECH, "stream": False}, headers=origin),
        post("/v1/audio/speech", json={**SPEECH, "stream_format": "sse"}, headers=origin),
        post("/v1/audio/speech", json={"input": ""}, headers=origin),
        post("/v1/audio/speech", content=b"x", headers=origin),
        post("/v1/audio/speech/batch", json={"items": [SPEECH]}, headers=origin),
        post("/v1/chat/completions", json=chat, headers=origin),
        post("/v1/chat/completions", json={**chat, "stream": True}, headers=origin),
        post("/generate", json={"text": "Hi."}, headers=origin),
        post("/generate/batch", json=[{"text": "Hi."}], headers=origin),
        post("/cancel", json={"request_id": "none"}, headers=origin),
        *(
            server.client.get(path, headers=origin)
            for path in ("/health", "/metrics", "/status", "/v1/audio/voices", "/docs", "/nowhere")
        ),
        server.client.delete("/v1/audio/speech", headers=origin),
    ]


@pytest.mark.parametrize("flags", [(), ("--response-cache", "1M")])
def test_every_header_that_is_sent_may_be_read(
    start_server: Any, fake_engine: Any, flags: tuple[str, ...]
) -> None:
    exposed = {name.lower() for name in EXPOSED_HEADERS}
    broken = start_server(fake_engine(fail_before=RuntimeError("broken")), *flags)
    loading = start_server(fake_engine(), "--api-key", "one", *flags)
    seeded = {**SPEECH, "seed": 1}
    working = start_server(None, *flags)
    cached = [working.client.post("/v1/audio/speech", json=seeded) for _ in range(2)]
    for reply in (*replies(working), *replies(broken), *replies(loading), *cached):
        sent = {name for name in reply.headers if not name.startswith("access-control-")}
        assert sent - SAFELISTED - NOT_FOR_SCRIPTS <= exposed, reply.request.url
        if "origin" in reply.request.headers:
            told = reply.headers["access-control-expose-headers"].split(", ")
            assert told == list(EXPOSED_HEADERS)


def test_the_documented_list_is_complete(repo_root: Path) -> None:
    text = (repo_root / "docs" / "serving.md").read_text(encoding="utf-8")
    listed = text.partition("<!-- exposed headers -->")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", listed)) == set(EXPOSED_HEADERS)
