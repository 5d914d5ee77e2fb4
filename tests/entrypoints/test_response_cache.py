"""``--response-cache``: which replies are answered from memory, and what clients see of it."""

from __future__ import annotations

import base64
import io
import json
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from vllm.entrypoints.bosonai.serving_voices import open_store
from vllm.entrypoints.bosonai.voices import VoiceLibrary
from vllm.entrypoints.cli_args import parse_serve_args
from vllm.exceptions import EngineError
from vllm.outputs import FinishReason

SIZE = ("--response-cache", "8M")
TEXT = "Hello there."


@pytest.fixture
def server(start_server: Callable[..., Any]) -> Any:
    return start_server(None, *SIZE)


def speak(server: Any, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    body = {"input": TEXT, "seed": 3, "response_format": "pcm", **fields}
    reply: httpx.Response = server.client.post("/v1/audio/speech", json=body, headers=headers)
    return reply


def cache_of(reply: httpx.Response) -> str | None:
    found: str | None = reply.headers.get("x-cache")
    return found


def num_made(server: Any) -> int:
    return len(server.engine.seen)


@pytest.mark.parametrize("stream", [None, False])
def test_a_hit_is_the_reply_that_was_made(server: Any, stream: bool | None) -> None:
    changing = {"x-request-id", "x-cache", "age", "date"}
    changing |= {"x-processing-time-seconds", "x-realtime-factor", "x-rtf"}
    for name in ("mp3", "opus", "aac", "flac", "wav", "pcm"):
        made, hit = (speak(server, response_format=name, stream=stream) for _ in range(2))
        assert (cache_of(made), cache_of(hit)) == ("miss", "hit")
        assert "age" not in made.headers
        assert int(hit.headers["age"]) >= 0
        assert hit.content == made.content
        lasting = made.headers.keys() - changing
        assert {key: hit.headers[key] for key in lasting} == {
            key: made.headers[key] for key in lasting
        }
        if stream is False:  # of its own, where the stand-in says that it took half a second
            assert made.headers["x-processing-time-seconds"] == "0.5000"
            assert hit.headers["x-processing-time-seconds"] != "0.5000"
    assert num_made(server) == 6


def events(reply: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in reply.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_events_are_answered_from_memory_too(server: Any) -> None:
    made, hit = (events(speak(server, stream_format="sse")) for _ in range(2))
    assert num_made(server) == 1
    assert hit[:-1] == made[:-1]
    assert (hit[-1]["usage"], hit[-1]["seed"]) == (made[-1]["usage"], 3)
    assert hit[-1]["stats"]["audio_duration_seconds"] == made[-1]["stats"]["audio_duration_seconds"]
    streamed = speak(server)
    assert cache_of(streamed) == "hit"
    assert streamed.content == b"".join(base64.b64decode(each["audio"]) for each in hit[:-1])


OTHER_MEANINGS: list[dict[str, Any]] = [
    {"input": "Hello there!"},
    {"seed": 4},
    {"voice": "en_man"},
    {"response_format": "wav"},
    {"stream": False},
    {"speed": 1.5},
    {"temperature": 0.5},
    {"top_k": 3},
    {"max_tokens": 12},
    {"ras_window_length": 0},
    {"ras_mode": "block"},
    {"instructions": "Slow."},
    {"system_prompt": "S"},
    {"language": "de"},
    {"normalize": False},
]
SAME_MEANING: list[dict[str, Any]] = [
    {"model": "tts-1"},
    {"voice": "alloy"},
    {"temperature": 1.0, "top_p": 0.95, "top_k": 50},
    {"ras_win_len": 7, "ras_win_max_num_repeat": 2},
    {"priority": 3, "timeout_s": 30, "request_id": "another"},
    {"unknown": 1},
]


def test_another_request_is_made_anew(server: Any) -> None:
    speak(server)
    made = [(fields, cache_of(speak(server, **fields))) for fields in OTHER_MEANINGS]
    assert made == [(fields, "miss") for fields in OTHER_MEANINGS]
    assert {cache_of(speak(server, **fields)) for fields in OTHER_MEANINGS} == {"hit"}


def test_a_request_of_the_same_meaning_is_a_hit(server: Any) -> None:
    speak(server)
    found = [(fields, cache_of(speak(server, **fields))) for fields in SAME_MEANING]
    assert found == [(fields, "hit") for fields in SAME_MEANING]


def test_requests_without_seed_bypass_the_cache(server: Any) -> None:
    for _ in range(2):
        assert cache_of(speak(server, seed=None)) == "bypass"
    greedy = {"seed": None, "temperature": 0}
    assert [cache_of(speak(server, **greedy)) for _ in range(2)] == ["miss", "hit"]


@pytest.mark.parametrize("value", ["no-store", "max-age=0, No-Cache"])
def test_a_client_can_ask_for_a_fresh_reply(server: Any, value: str) -> None:
    for _ in range(2):
        assert cache_of(speak(server, {"Cache-Control": value})) == "bypass"
    assert num_made(server) == 2
    assert cache_of(speak(server)) == "miss"


def test_there_is_no_cache_unless_asked_for(start_server: Callable[..., Any]) -> None:
    server = start_server()
    for _ in range(2):
        assert cache_of(speak(server)) is None
    assert num_made(server) == 2
    assert "response_cache" not in server.client.get("/metrics").text


def test_a_reply_that_failed_is_made_again(
    start_server: Callable[..., Any], fake_engine: Any
) -> None:
    server = start_server(fake_engine(fail_after=EngineError("broken")), *SIZE)
    for fields in ({}, {"stream_format": "sse"}, {"stream": False}):
        try:
            reply = speak(server, **fields)
            assert reply.status_code == 500 or "speech.audio.error" in reply.text
        except httpx.RemoteProtocolError:
            pass
    server.engine.fail_after = None
    for fields in ({}, {"stream": False}):
        assert cache_of(speak(server, **fields)) == "miss"


def test_a_reply_that_ran_out_of_time_is_made_again(
    start_server: Callable[..., Any], fake_engine: Any
) -> None:
    server = start_server(fake_engine(finish_reason=FinishReason.DEADLINE), *SIZE)
    cut = speak(server, stream=False, timeout_s=1)
    assert cut.headers["x-finish-reason"] == "deadline"
    server.engine.finish_reason = FinishReason.STOP
    whole = speak(server, stream=False)
    assert (cache_of(whole), whole.headers["x-finish-reason"]) == ("miss", "stop")


def test_a_reply_whose_client_left_is_made_again(
    start_server: Callable[..., Any], fake_engine: Any
) -> None:
    server = start_server(fake_engine(holds_at=1), *SIZE)
    body = {"input": TEXT, "seed": 3, "response_format": "pcm"}
    with server.client.stream("POST", "/v1/audio/speech", json=body) as reply:
        pieces = reply.iter_raw()
        next(pieces)
    server.wait_until(lambda: server.engine.aborted)
    server.engine.go_on.set()
    assert cache_of(speak(server)) == "miss"
    assert cache_of(speak(server)) == "hit"


def test_equal_requests_at_one_time_are_each_whole(
    start_server: Callable[..., Any], fake_engine: Any
) -> None:
    server = start_server(fake_engine(holds_at=1), *SIZE)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(speak, server) for _ in range(6)]
        server.wait_until(lambda: num_made(server) == 6)
        server.engine.go_on.set()
        replies = [each.result() for each in asked]
    assert {cache_of(reply) for reply in replies} == {"miss"}
    assert len({reply.content for reply in replies}) == 1
    assert cache_of(speak(server)) == "hit"


def test_a_full_server_still_answers_hits(
    start_server: Callable[..., Any], fake_engine: Any
) -> None:
    server = start_server(fake_engine(), *SIZE, "--max-concurrent-connections", "1")
    speak(server)
    server.engine.holds_at = 0
    with server.asking({"input": TEXT, "seed": 9}):
        server.wait_until(lambda: server.client.get("/load").json()["server_load"] == 1)
        hit = speak(server)
        assert (hit.status_code, cache_of(hit)) == (200, "hit")
        assert hit.headers["x-queue-status"] == "queue=0,active=2"
        assert speak(server, seed=10).status_code == 503
    assert server.client.get("/stats").json()["total_requests"] == 2


def test_keys_do_not_share_replies(start_server: Callable[..., Any]) -> None:
    server = start_server(None, *SIZE, "--api-key", "a", "b")
    found = [
        cache_of(speak(server, {"Authorization": f"Bearer {key}"})) for key in ("a", "b", "a", "b")
    ]
    assert found == ["miss", "miss", "hit", "hit"]


def test_metrics_count_lookups(server: Any) -> None:
    for fields in ({}, {}, {"seed": 4}, {"seed": None}):
        speak(server, **fields)
    page = server.client.get("/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[:1] != "#")
    label = '{model_name="tts-test"}'
    assert float(figures[f"vllm:response_cache_queries_total{label}"]) == 3
    assert float(figures[f"vllm:response_cache_hits_total{label}"]) == 1
    assert float(figures[f"vllm:response_cache_replies{label}"]) == 2
    num_bytes = float(figures[f"vllm:response_cache_bytes{label}"])
    assert 2 * len(speak(server).content) < num_bytes < 3 * len(speak(server).content)


def test_the_proxy_and_batches_use_the_cache(server: Any) -> None:
    body = {"text": TEXT, "seed": 3}
    made, hit = (server.client.post("/generate", json=body) for _ in range(2))
    assert (cache_of(made), cache_of(hit)) == ("miss", "hit")
    assert hit.content == made.content
    assert hit.headers["x-concurrent-requests"] == "1"
    item = {"input": TEXT, "seed": 3, "response_format": "pcm"}
    batches = [
        server.client.post("/v1/audio/speech/batch", json={"items": [item]}).json()
        for _ in range(2)
    ]
    assert batches[0]["results"][0]["audio_data"] == batches[1]["results"][0]["audio_data"]
    assert num_made(server) == 2


def test_browsers_may_read_its_headers(server: Any) -> None:
    exposed = speak(server, {"Origin": "http://x"}).headers["access-control-expose-headers"]
    assert {"X-Cache", "Age"} <= set(exposed.split(", "))


def wav(pitch: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(24_000)
        file.writeframes((9000 * np.sin(np.arange(24_000) / pitch)).astype("<i2").tobytes())
    return buffer.getvalue()


def test_a_voice_that_was_replaced_is_not_heard_again(
    start_server: Callable[..., Any], tmp_path: Path
) -> None:
    flags = [*SIZE, "--voice-store", str(tmp_path / "voices")]
    server = start_server(None, *flags)
    store = open_store(parse_serve_args(flags).server)
    server.engine.voices = VoiceLibrary.for_engine(server.engine.info, store=store)

    def upload(pitch: int, words: str = "Words.") -> None:
        form = {"name": "anna", "transcript": words}
        files = {"audio_sample": ("a.wav", wav(pitch), "audio/wav")}
        reply = server.client.post("/v1/audio/voices", data=form, files=files)
        assert reply.status_code == 200

    def remove() -> None:
        assert server.client.delete("/v1/audio/voices/anna").status_code == 200

    fields = {"voice": "anna"}
    upload(20)
    assert [cache_of(speak(server, **fields)) for _ in range(2)] == ["miss", "hit"]
    remove()
    assert speak(server, **fields).status_code == 400
    upload(30)
    assert [cache_of(speak(server, **fields)) for _ in range(2)] == ["miss", "hit"]
    remove()
    upload(30, words="Other words.")
    assert cache_of(speak(server, **fields)) == "miss"
    heard = server.engine.seen[-1][0].voice  # what the key was made of is what the engine got
    assert (heard.voice_id, heard.transcript) == ("anna", "Other words.")
