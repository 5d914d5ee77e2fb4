"""OpenAI's own client against the server, as its users write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest

FORMATS: tuple[Literal["mp3", "opus", "aac", "flac", "wav", "pcm"], ...] = (
    "mp3",
    "opus",
    "aac",
    "flac",
    "wav",
    "pcm",
)
MAGIC = {"mp3": b"\xff\xf3", "opus": b"OggS", "aac": b"\xff\xf1", "flac": b"fLaC", "wav": b"RIFF"}


@pytest.fixture(scope="module")
def client(live: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="dummy", max_retries=0) as client:
        yield client


@pytest.fixture
def connect() -> Iterator[Callable[..., openai.OpenAI]]:
    clients: list[openai.OpenAI] = []

    def make(server: Any, key: str, retries: int = 0) -> openai.OpenAI:
        clients.append(openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=retries))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.mark.parametrize("name", FORMATS)
def test_create(
    client: openai.OpenAI,
    name: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"],
    tmp_path: Path,
) -> None:
    reply = client.audio.speech.create(
        model="tts-1", voice="alloy", input="Hello.", response_format=name
    )
    reply.write_to_file(tmp_path / "speech")
    data = (tmp_path / "speech").read_bytes()
    assert data.startswith(MAGIC.get(name, b""))
    assert len(data) > 500


def test_streaming_response(client: openai.OpenAI) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="alloy", input="Hello.", response_format="pcm"
    ) as reply:
        assert reply.request_id
        assert sum(map(len, reply.iter_bytes())) == 2 * 12 * 960


def test_sse(client: openai.OpenAI) -> None:
    reply = client.audio.speech.create(
        model="tts-1", voice="alloy", input="Hello.", stream_format="sse"
    )
    assert b"speech.audio.done" in reply.read()


def test_extra_body(client: openai.OpenAI, live: Any) -> None:
    client.audio.speech.create(
        model="tts-1",
        voice={"id": "en_man"},
        input="Hello.",
        instructions="Calm.",
        extra_body={"seed": 8, "ras_win_len": 0},
    )
    prompt, params, _ = live.engine.seen[-1]
    assert (prompt.voice.voice_id, prompt.instructions) == ("en_man", "Calm.")
    assert (params.seed, params.uses_ras) == (8, False)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tts-test", "tts-1"]
    assert client.models.retrieve("tts-1").id == "tts-1"


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-9' does not exist") as caught:
        client.audio.speech.create(model="gpt-9", voice="alloy", input="Hello.")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_an_unknown_voice(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'nobody' is unknown") as caught:
        client.audio.speech.create(model="tts-1", voice="nobody", input="Hello.")
    assert (caught.value.code, caught.value.param) == ("voice_not_found", "voice")


def test_a_wrong_key(start_server: Any, connect: Any) -> None:
    server = start_server(None, "--api-key", "right")
    with pytest.raises(openai.AuthenticationError, match="Unauthorized") as caught:
        connect(server, "wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert connect(server, "right").models.list().data


def test_a_full_server_is_tried_again(start_server: Any, busy_at_first: Any, connect: Any) -> None:
    server = start_server(busy_at_first)
    reply = connect(server, "k", 2).audio.speech.create(
        model="tts-1", voice="alloy", input="Hi.", response_format="pcm"
    )
    assert len(reply.content) == 2 * 6 * 960
    assert len(server.engine.seen) == 2


def test_a_failure_is_not_tried_again(start_server: Any, fake_engine: Any, connect: Any) -> None:
    from vllm.exceptions import EngineError

    server = start_server(fake_engine(fail_before=EngineError("always")))
    with pytest.raises(openai.InternalServerError, match="always"):
        connect(server, "k", 2).audio.speech.create(model="tts-1", voice="alloy", input="Hi.")
    assert len(server.engine.seen) == 1
