"""Uploading, listing and deleting voices over HTTP."""

from __future__ import annotations

import base64
import io
import socket
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import openai
import pytest

from vllm.entrypoints.bosonai.serving_voices import open_store
from vllm.entrypoints.bosonai.voices import VoiceLibrary
from vllm.entrypoints.cli_args import parse_serve_args

WORDS = "What the clip says."


def wav(seconds: float = 1.0, rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        tone = 9000 * np.sin(np.arange(int(rate * seconds)) / 20)
        file.writeframes(tone.astype("<i2").tobytes())
    return buffer.getvalue()


@pytest.fixture
def start(start_server: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """A server on a store of its own, with real voices before the fake engine."""

    def start(*flags: str) -> Any:
        flags = flags or ("--voice-store", str(tmp_path / "voices"))
        server = start_server(None, *flags)
        store = open_store(parse_serve_args(list(flags)).server)
        server.engine.voices = VoiceLibrary.for_engine(server.engine.info, store=store)
        return server

    return start


@pytest.fixture
def server(start: Callable[..., Any]) -> Iterator[Any]:
    return start()


def upload(server: Any, sample: bytes | None = None, **fields: str) -> Any:
    form = {"name": "anna", "transcript": WORDS} | fields
    files = {"audio_sample": ("a.wav", wav() if sample is None else sample, "audio/wav")}
    return server.client.post("/v1/audio/voices", data=form, files=files)


def ids(server: Any) -> list[str]:
    return [voice["id"] for voice in server.client.get("/v1/audio/voices").json()["voices"]]


def test_openais_client_creates_uses_and_deletes_a_voice(server: Any) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    voice = client.audio.voices.create(
        name="Anna B",
        audio_sample=("a.wav", wav(), "audio/wav"),
        consent="cons_1",
        extra_body={"transcript": WORDS},
    )
    assert (voice.id, voice.name, voice.object) == ("Anna_B", "Anna B", "audio.voice")
    reply = client.audio.speech.create(input="Hi.", model="tts-1", voice={"id": voice.id})
    assert reply.response.headers["x-voice"] == "Anna_B"
    deleted = client.audio.voices.delete(voice.id)
    assert deleted.deleted
    with pytest.raises(openai.BadRequestError, match="unknown"):
        client.audio.speech.create(input="Hi.", model="tts-1", voice="Anna_B")
    client.close()


def test_an_upload_is_listed_and_remembers_consent(server: Any, tmp_path: Path) -> None:
    assert upload(server, consent="signed", language="de").status_code == 200
    entry = server.client.get("/v1/audio/voices").json()["voices"][-1]
    assert (entry["id"], entry["uploaded"], entry["language"]) == ("anna", True, "de")
    assert entry["duration"] == 1.0
    assert server.client.get("/voices").json() == ids(server)
    assert "signed" in (tmp_path / "voices" / "anna" / "voice.json").read_text()


def test_json_with_a_data_url(server: Any) -> None:
    body = {
        "name": "anna",
        "audio_sample": "data:audio/wav;base64," + base64.b64encode(wav()).decode(),
        "ref_text": WORDS,
    }
    assert server.client.post("/voices", json=body).json()["id"] == "anna"
    assert server.engine.voices.resolve("anna").transcript == WORDS


def test_a_voice_in_words(server: Any) -> None:
    body = {"name": "deep", "type": "prompt", "prompt": "A deep, slow voice."}
    assert server.client.post("/v1/audio/voices", json=body).json()["type"] == "prompt"
    assert server.engine.voices.resolve("deep").scene == "A deep, slow voice."


def test_the_engine_prepares_an_upload(server: Any) -> None:
    upload(server)
    while not server.engine.seen:
        assert server.client.get("/health").status_code == 200
    assert server.engine.seen[0][0].voice.voice_id == "anna"


@pytest.mark.parametrize("words", ["", "  "])
def test_a_prompt_needs_the_words_of_its_clip(server: Any, words: str) -> None:
    body = {"wav_base64": base64.b64encode(wav()).decode(), "prompt_text": words}
    reply = server.client.post("/add_prompt", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt_text")


def test_add_and_remove_prompt(server: Any) -> None:
    body = {"wav_base64": base64.b64encode(wav()).decode(), "wav_format": "wav"}
    reply = server.client.post("/add_prompt", json={**body, "prompt_text": WORDS})
    prompt_id = reply.json()["prompt_id"]
    assert len(prompt_id) == 32
    spoken = server.client.post("/v1/audio/speech", json={"input": "a", "voice": prompt_id})
    assert spoken.headers["x-voice"] == prompt_id
    removal = {"prompt_id": prompt_id}
    assert server.client.post("/remove_prompt", json=removal).json() == {"status": "ok"}
    assert server.client.post("/remove_prompt", json=removal).status_code == 404


@pytest.mark.parametrize(
    ("fields", "sample", "param"),
    [
        ({"transcript": ""}, None, "transcript"),
        ({"name": ""}, None, "name"),
        ({"name": "x" * 65}, None, "name"),
        ({"type": "clip"}, None, "type"),
        ({"type": "prompt"}, None, "prompt"),
        ({"language": "../de"}, None, "language"),
        ({"transcript": "x" * 2001}, None, "transcript"),
        ({}, b"", "audio_sample"),
        ({}, b"not audio at all", "audio_sample"),
        ({}, wav(0.2), "audio_sample"),
        ({}, wav(31), "audio_sample"),
        ({}, b"RIFF" + bytes(10 * 2**20), "audio_sample"),
    ],
)
def test_wrong_uploads(
    server: Any, fields: dict[str, str], sample: bytes | None, param: str
) -> None:
    reply = upload(server, sample, **fields)
    assert reply.status_code == 400, reply.text[:300]
    assert reply.json()["error"]["param"] == param
    assert param in reply.json()["error"]["message"]
    assert "anna" not in ids(server)


def test_a_clip_that_is_missing(server: Any) -> None:
    reply = server.client.post("/v1/audio/voices", json={"name": "a", "transcript": WORDS})
    assert reply.json()["error"]["param"] == "audio_sample"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff"])
def test_bodies_that_are_no_upload(server: Any, body: bytes) -> None:
    for kind in ("application/json", "multipart/form-data; boundary=x", "multipart/form-data"):
        reply = server.client.post("/v1/audio/voices", content=body, headers={"Content-Type": kind})
        assert reply.status_code == 400, (kind, reply.text)


def test_forms_are_for_uploads_alone(server: Any) -> None:
    assert server.client.post("/v1/audio/voices", content=b"x").status_code == 415
    assert server.client.post("/add_prompt", files={"a": b"x"}).status_code == 415


@pytest.mark.parametrize("name", ["en_woman", "alloy"])
def test_names_of_the_server_are_not_given_away(server: Any, name: str) -> None:
    reply = upload(server, name=name)
    assert (reply.status_code, reply.headers["x-should-retry"]) == (409, "false")
    assert server.client.delete(f"/v1/audio/voices/{name}").status_code == 403


def test_a_name_is_taken_once(server: Any) -> None:
    assert upload(server).status_code == 200
    reply = upload(server)
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "voice_conflict")


def test_uploads_can_be_refused(start: Callable[..., Any]) -> None:
    server = start("--voice-store", "none")
    assert upload(server).status_code == 403
    assert server.client.delete("/v1/audio/voices/anna").status_code == 403


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Value of ``--voice-store``."""
    if request.param == "folder":
        return str(tmp_path / "shared")
    return f"s3://{request.getfixturevalue('bucket')}/tts"


def speak(server: Any, voice: str) -> Any:
    return server.client.post("/v1/audio/speech", json={"input": "a", "voice": voice})


def delete(server: Any, voice: str = "anna") -> Any:
    return server.client.delete(f"/v1/audio/voices/{voice}")


def test_servers_share_a_store(start: Callable[..., Any], place: str) -> None:
    here, there = start("--voice-store", place), start("--voice-store", place)
    assert speak(there, "anna").status_code == 400
    assert upload(here).status_code == 200
    assert ids(there) == ids(here)
    assert ids(here)[-1] == "anna"
    assert speak(there, "anna").headers["x-voice"] == "anna"
    assert upload(there).status_code == 409
    assert delete(there).status_code == 200
    assert delete(here).status_code == 404
    for server in (here, there):
        assert "anna" not in ids(server)
        assert speak(server, "anna").json()["error"]["code"] == "voice_not_found"


def test_the_same_name_at_two_servers_at_once(start: Callable[..., Any], place: str) -> None:
    servers = [start("--voice-store", place) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        statuses = sorted(reply.status_code for reply in pool.map(upload, servers * 2))
        assert statuses == [200, 409, 409, 409]
        deletions = {reply.status_code for reply in pool.map(delete, servers * 2)}
    assert 200 in deletions
    assert deletions <= {200, 404}
    assert "anna" not in ids(servers[0])
    assert upload(servers[1]).status_code == 200


def assert_store_failed(reply: Any) -> None:
    assert reply.status_code == 503, reply.text
    assert reply.json()["error"]["code"] == "voice_store_error"
    assert "voice store" in reply.json()["error"]["message"]
    assert int(reply.headers["retry-after"]) >= 1


def test_a_store_that_does_not_answer_holds_up_nothing_else(
    start: Callable[..., Any], s3: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(8) as pool:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        server = start("--voice-store", "s3://voices/tts")
        waiting = [pool.submit(server.client.get, "/v1/audio/voices") for _ in range(2)]
        waiting += [pool.submit(speak, server, "nobody") for _ in range(6)]
        connection, _ = silent.accept()
        assert speak(server, "en_man").status_code == 200
        assert server.client.get("/health").status_code == 200
        assert not any(reply.done() for reply in waiting)
        connection.close()
        silent.close()
        for reply in waiting:
            assert_store_failed(reply.result())


def test_a_store_that_is_gone(
    start: Callable[..., Any], s3: None, start_s3: Callable[[], Any], monkeypatch: Any
) -> None:
    service = start_s3()
    monkeypatch.setenv("AWS_ENDPOINT_URL", service.url)
    boto3.client("s3").create_bucket(Bucket="voices")
    server = start("--voice-store", "s3://voices/tts")
    for name in ("anna", "bert"):
        assert upload(server, name=name).status_code == 200
        assert speak(server, name).status_code == 200
    server.engine.voices.forget("bert")
    service.stop()
    assert speak(server, "anna").status_code == 200
    assert speak(server, "alloy").status_code == 200
    assert server.client.get("/health").status_code == 200
    for reply in (
        speak(server, "bert"),
        server.client.get("/v1/audio/voices"),
        server.client.get("/voices"),
        upload(server, name="carl"),
        upload(server, name="dora", type="prompt", prompt="Deep."),
        delete(server),
        server.client.post("/remove_prompt", json={"prompt_id": "anna"}),
    ):
        assert_store_failed(reply)


def test_a_codec_that_cannot_encode(start_server: Any, fake_engine: Any, tmp_path: Path) -> None:
    server = start_server(fake_engine(can_encode=False), "--voice-store", str(tmp_path))
    reply = upload(server)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "audio_sample")
