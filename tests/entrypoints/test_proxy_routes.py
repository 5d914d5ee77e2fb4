"""``/generate`` and ``/generate/batch``: the proxy's fields, bodies, headers and statuses."""

from __future__ import annotations

import base64
import io
import wave
from typing import Any

import numpy as np
import pytest

from vllm.audio import encode_all, lookup

RATE = 24_000


@pytest.fixture(scope="module")
def clip() -> str:
    samples = np.sin(np.arange(RATE) / 20).astype(np.float32) / 2
    return base64.b64encode(encode_all(samples, lookup("wav"), RATE)).decode()


def frames_in(data: bytes) -> int:
    with wave.open(io.BytesIO(data)) as file:
        return file.getnframes()


def test_a_complete_wav_with_the_proxys_headers(live: Any) -> None:
    reply = live.client.post("/generate", json={"text": "hello"})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "audio/wav")
    assert frames_in(reply.content) == 5 * 2 * 960
    assert float(reply.headers["x-generation-time"]) >= 0
    assert reply.headers["x-concurrent-requests"] == "1"
    assert reply.headers["x-mode"] == "vllm"
    assert reply.headers["x-finish-reason"] == "stop"
    assert reply.headers["x-queue-position"] == "0"


def test_the_proxys_defaults(start_server: Any) -> None:
    server = start_server()
    server.client.post("/generate", json={"text": "hello", "unknown": 1})
    prompt, params, _ = server.engine.seen[0]
    assert prompt.system_prompt is None
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 0.95, 50)
    assert (params.max_tokens, params.seed) == (2048, None)


def test_every_field_is_honoured_together(start_server: Any, clip: str) -> None:
    server = start_server()
    body = {
        "text": "hello",
        "system_prompt": "Speak like a king.",
        "reference_audio_base64": clip,
        "reference_text": "These are the words of the clip.",
        "temperature": 0.3,
        "top_p": 0.8,
        "top_k": 7,
        "max_tokens": 300,
        "seed": 5,
        "priority": -1,
        "timeout_s": 8000,
        "request_id": "mine",
    }
    reply = server.client.post("/generate", json=body)
    assert reply.status_code == 200
    assert (reply.headers["x-request-id"], reply.headers["x-seed"]) == ("mine", "5")
    prompt, params, _ = server.engine.seen[0]
    assert (prompt.text, prompt.system_prompt) == ("hello", "Speak like a king.")
    assert prompt.ref_audio.shape == (RATE,)
    assert prompt.ref_text == "These are the words of the clip."
    assert (params.temperature, params.top_p, params.top_k) == (0.3, 0.8, 7)
    assert (params.max_tokens, params.seed) == (300, 5)
    assert server.engine.priorities == [-1]
    assert 0 < server.engine.timeouts[0] <= 8000


@pytest.mark.parametrize("fields", [{}, {"reference_text": " "}])
def test_a_clip_without_transcript_gets_the_proxys(
    start_server: Any, clip: str, fields: dict[str, str]
) -> None:
    server = start_server()
    server.client.post("/generate", json={"text": "a", "reference_audio_base64": clip, **fields})
    assert server.engine.seen[0][0].ref_text == "Please speak naturally."


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"text": "  "}, 400, "text"),
        ({"target_text": "hello"}, 400, "target_text"),
        ({"text": "hello", "target_text": "hello"}, 400, "target_text"),
        ({}, 422, "text"),
        ({"text": "a", "temperature": 0.05}, 422, "temperature"),
        ({"text": "a", "top_k": 101}, 422, "top_k"),
        ({"text": "a", "max_tokens": 255}, 422, "max_tokens"),
        ({"text": "a", "voice": "nobody"}, 400, "voice"),
    ],
)
def test_refusals(live: Any, body: dict[str, Any], status: int, param: str) -> None:
    before = live.client.get("/stats").json()["total_requests"]
    reply = live.client.post("/generate", json=body)
    assert reply.status_code == status
    assert reply.json()["error"]["param"] == param
    assert reply.json()["detail"] == reply.json()["error"]["message"]
    assert live.client.get("/stats").json()["total_requests"] == before


def test_target_text_names_the_family(live: Any) -> None:
    assert "VoxCPM" in live.client.post("/generate", json={"target_text": "a"}).json()["detail"]


def test_a_blank_text_is_told_in_the_proxys_words(live: Any) -> None:
    reply = live.client.post("/generate", json={"text": ""})
    assert reply.json()["detail"] == "Text cannot be empty"


def test_json_that_is_none_is_a_422(live: Any) -> None:
    headers = {"Content-Type": "application/json"}
    assert live.client.post("/generate", content=b"{", headers=headers).status_code == 422
    assert live.client.post("/v1/audio/speech", content=b"{", headers=headers).status_code == 400


def test_a_bad_item_spoils_no_other(start_server: Any) -> None:
    server = start_server()
    items = [{"text": "a"}, {"text": " "}, {"text": "bcd", "voice": "nobody"}, {"text": "ef"}]
    reply = server.client.post("/generate/batch", json=items).json()
    assert (reply["total"], reply["successful"], reply["failed"], reply["mode"]) == (
        4,
        2,
        2,
        "vllm",
    )
    one, blank, voiceless, two = reply["results"]
    assert [each["index"] for each in reply["results"]] == [0, 1, 2, 3]
    assert blank == {"index": 1, "success": False, "error": "400: Text cannot be empty"}
    assert voiceless["error"].startswith("400: voice 'nobody'")
    sizes = [frames_in(base64.b64decode(each["audio_base64"])) for each in (one, two)]
    assert sizes == [2 * 960, 4 * 960]
    assert one["usage"]["audio_tokens"] == 2
    assert one["generation_time"] >= 0
    assert server.client.get("/stats").json()["total_requests"] == 2


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([{"text": "a"}, {"text": "b", "top_k": 0}], "1.top_k"),
        ([{"text": "a"}] * 65, None),
        ({"text": "a"}, None),
    ],
)
def test_a_wrong_list_is_refused_whole(live: Any, items: Any, param: str | None) -> None:
    reply = live.client.post("/generate/batch", json=items)
    assert reply.status_code == 422
    assert reply.json()["error"]["param"] == param


def test_an_empty_list_gives_zeros(live: Any) -> None:
    reply = live.client.post("/generate/batch", json=[]).json()
    assert (reply["results"], reply["total"], reply["successful"]) == ([], 0, 0)


def test_a_batch_larger_than_the_limit_takes_turns(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(max_num_seqs=2))
    reply = server.client.post("/generate/batch", json=[{"text": "a"}] * 12).json()
    assert reply["successful"] == 12
    assert server.client.get("/stats").json()["peak_concurrent"] == 2


def test_speakers_of_the_proxy_have_voices(live: Any) -> None:
    body = {"text": "[SPEAKER0] Hi.", "voices": {"SPEAKER0": "onyx"}}
    assert live.client.post("/generate", json=body).headers["x-voice"] == "en_man"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": "a" * 100_001}, "text"),
        ({"text": "Hi.", "voices": {"SPEAKER0": "en_man"}}, "text"),
        ({"text": "Hi.", "reference_audio_base64": "!"}, "reference_audio_base64"),
        ({"text": "Hi.", "voice": "nobody"}, "voice"),
    ],
)
def test_errors_name_the_proxys_own_fields(live: Any, fields: dict[str, Any], param: str) -> None:
    error = live.client.post("/generate", json=fields).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param} ")
