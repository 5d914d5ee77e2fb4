"""Two hundred wrong requests: each is a 4xx in OpenAI's form that names the field at fault."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from vllm.entrypoints.bosonai.middleware import LastResortMiddleware

NUMBER_FIELDS = {  # field -> values out of its range
    "speed": [0.24, 4.01, -1, 0, 1e300, 10**400],
    "temperature": [-0.1, 101, 1e300],
    "top_p": [0, -0.5, 1.01, 5],
    "top_k": [-2, 2**31, 1.5, 10**30],
    "seed": [-1, 2**64, 10**40, 0.5],
    "max_tokens": [0, -1, 2**31, 1.5],
    "max_new_tokens": [0, -1, 2**31],
    "max_completion_tokens": [0, -1, 2**31],
    "ras_window_length": [-1, 65, 10**9, 0.5],
    "ras_win_len": [-1, 65],
    "ras_max_num_repeat": [-1, 2**31, 0.5],
    "ras_win_max_num_repeat": [-1, 2**31],
    "min_p": [0.1, -1],
    "presence_penalty": [0.5],
    "frequency_penalty": [0.5],
    "repetition_penalty": [1.2, 0],
}
TEXT_FIELDS = (
    "input",
    "model",
    "instructions",
    "system_prompt",
    "language",
    "ref_audio",
    "reference_audio_base64",
    "ref_text",
    "reference_text",
)
CHOICE_FIELDS = {
    "response_format": ["ogg", "MP3", "", "wav "],
    "stream_format": ["json", "SSE", ""],
    "ras_mode": ["ban", ""],
    "eos_rule": ["loose", ""],
}
SWITCH_FIELDS = ("stream", "normalize")
WRONG_FOR_NUMBERS: tuple[Any, ...] = ("1", "", True, [1], {"a": 1})
WRONG_FOR_TEXTS: tuple[Any, ...] = (1, 1.5, True, ["a"], {"a": 1})
WRONG_FOR_SWITCHES: tuple[Any, ...] = ("true", 1, [True])


def wrong_fields() -> list[tuple[str, Any]]:
    cases: list[tuple[str, Any]] = []
    for name, values in NUMBER_FIELDS.items():
        cases += [(name, value) for value in (*values, *WRONG_FOR_NUMBERS)]
    for name in TEXT_FIELDS:
        cases += [(name, value) for value in WRONG_FOR_TEXTS]
    for name, choices in CHOICE_FIELDS.items():
        cases += [(name, value) for value in (*choices, 1, ["mp3"])]
    cases += [(name, value) for name in SWITCH_FIELDS for value in WRONG_FOR_SWITCHES]
    cases += [("input", value) for value in (None, "", "  \n", "\ud800", "a" * 200_000)]
    cases += [("voice", value) for value in (1, True, [], {}, {"id": 1}, {"id": ""}, "nobody")]
    cases += [("voice", "v" * 300), ("voice", "\ud83d"), ("model", "m" * 300)]
    cases += [("stop", value) for value in (1, {}, [1], ["a", None])]
    cases += [("ref_audio", "AAAA"), ("ref_text", "no clip")]
    return cases


# cases whose blame lies with a partner of the field
BLAMED = {("ref_audio", "AAAA"): "ref_text", ("ref_text", "no clip"): "ref_audio"}
RAW_BODIES = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe\x00binary",
    b"[" * 100_000,
    b'{"input": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"input": "a", "temperature": NaN}',
    b'{"input": "a", "speed": Infinity}',
)
CONTENT_TYPES = ("text/plain", "", "multipart/form-data; boundary=x", "application/xml")


def test_there_are_two_hundred() -> None:
    assert len(wrong_fields()) + len(RAW_BODIES) + len(CONTENT_TYPES) >= 200


def test_each_wrong_field_is_named(live: Any) -> None:
    for name, value in wrong_fields():
        reply = live.client.post(
            "/v1/audio/speech",
            content=json.dumps({"input": "Hi.", name: value}),
            headers={"Content-Type": "application/json"},
        )
        shown = f"{name}={str(value)[:40]!r}: {reply.status_code} {reply.text[:300]}"
        if name == "model" and isinstance(value, str) and len(value) < 256:
            assert reply.status_code == 404, shown
            continue
        assert reply.status_code == 400, shown
        error = reply.json()["error"]
        blamed = BLAMED.get((name, value) if isinstance(value, str) else ("", ""), name)
        assert error["param"] == blamed, shown
        assert blamed in error["message"], shown
        assert error["type"] == "invalid_request_error"


def test_bodies_that_are_no_object(live: Any) -> None:
    for body in RAW_BODIES:
        reply = live.client.post(
            "/v1/audio/speech", content=body, headers={"Content-Type": "application/json"}
        )
        assert reply.status_code == 400, body[:40]
        assert reply.json()["error"]["message"]


@pytest.mark.parametrize("content_type", CONTENT_TYPES)
def test_other_content_types(live: Any, content_type: str) -> None:
    reply = live.client.post(
        "/v1/audio/speech", content=b'{"input": "a"}', headers={"Content-Type": content_type}
    )
    assert reply.status_code == 415
    assert reply.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("PUT", "/v1/models", 405), ("POST", "/health", 405), ("POST", "/no", 404)],
)
def test_a_missing_route_is_told_before_a_wrong_content_type(
    live: Any, method: str, path: str, status: int
) -> None:
    assert live.client.request(method, path, content=b"x").status_code == status


def test_a_wrong_method_is_told_all_that_there_are(live: Any) -> None:
    reply = live.client.request("PUT", "/v1/audio/voices", json={})
    assert reply.status_code == 405
    assert reply.headers["allow"] == "GET, POST"


def test_a_body_that_is_too_large(start_server: Any) -> None:
    server = start_server(None, "--max-body-mib", "0.01")
    body = json.dumps({"input": "a", "x": "y" * 20_000}).encode()
    headers = {"Content-Type": "application/json"}
    declared = server.client.post("/v1/audio/speech", content=body, headers=headers)
    chunked = server.client.post("/v1/audio/speech", content=iter([body]), headers=headers)
    assert declared.status_code == chunked.status_code == 413
    assert declared.json()["error"]["code"] == "request_too_large"


def test_a_good_request_works_after_all_of_them(live: Any) -> None:
    reply = live.client.post("/v1/audio/speech", json={"input": "Hi.", "response_format": "pcm"})
    assert reply.status_code == 200
    assert len(reply.content) == 2 * 3 * 2 * 960


def test_every_failure_has_one_form(live: Any) -> None:
    replies = [
        live.client.get("/nowhere"),
        live.client.get("/v1/audio/speech"),
        live.client.get("/v1/models/none"),
        live.client.post("/v1/audio/speech", content=b"x"),
        live.client.post("/v1/audio/speech", json={}),
        live.client.post("/v1/audio/speech", json={"input": "a", "model": "none"}),
    ]
    assert [reply.status_code for reply in replies] == [404, 405, 404, 415, 400, 404]
    for reply in replies:
        body = reply.json()
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["code"] == reply.status_code
        assert body["detail"] == body["message"] == body["error"]["message"]
        assert reply.headers["x-request-id"]


def test_a_client_that_leaves_amid_its_body_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def route(*_: Any) -> None:
        raise ClientDisconnect

    async def send(message: Any) -> None:
        raise AssertionError(f"nobody is there to read {message}")

    asyncio.run(LastResortMiddleware(route)({"type": "http"}, None, send))
    assert not caplog.records
