"""``/tokenize`` and ``/detokenize`` over a real tokenizer; the engine is a stand-in."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm.checkpoints.make_tokenizer import make_tokenizer
from vllm.config import EngineConfig
from vllm.prompts import TextTokenizer
from vllm.v1.engine.processor import Processor

TEXT = "Hello there."
BEGIN = "<|begin_of_text|>"


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and the configuration that goes with it; no weights are needed."""
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(folder)
    tokenizer = TextTokenizer.from_folder(folder)
    config = {
        "model_type": "higgs_audio_v2",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_codebooks": 8,
        "codebook_size": 1026,
        "audio_stream_bos_id": 1024,
        "audio_stream_eos_id": 1025,
        "audio_token_id": tokenizer.token_id("<|AUDIO_OUT|>"),
        "audio_bos_token_id": tokenizer.token_id("<|audio_out_bos|>"),
        "audio_delay_token_id": tokenizer.token_id("<|reserved_special_token_6|>"),
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def server(start_server: Any, model_folder: Path) -> Iterator[Any]:
    server = start_server()
    engine = server.engine
    engine.info = dataclasses.replace(
        engine.info,
        architecture="HiggsAudioV2ForConditionalGeneration",
        model_folder=str(model_folder),
        tokenizer_folder=str(model_folder),
    )
    engine.processor = Processor(EngineConfig(), engine.info, engine.voices)
    return server


def tokenize(server: Any, **body: Any) -> dict[str, Any]:
    reply = server.client.post("/tokenize", json=body)
    assert reply.status_code == 200, reply.text
    content: dict[str, Any] = reply.json()
    return content


def text_of(server: Any, tokens: list[int]) -> str:
    reply = server.client.post("/detokenize", json={"tokens": tokens})
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["prompt"]
    return text


def refusal(server: Any, path: str, body: dict[str, Any], status: int = 400) -> dict[str, Any]:
    reply = server.client.post(path, json=body)
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    return error


def test_a_text(server: Any) -> None:
    answer = tokenize(server, prompt=TEXT, model="tts-1")
    assert answer.keys() == {"count", "max_model_len", "tokens", "token_strs", "parts"}
    assert answer["count"] == len(answer["tokens"]) == answer["parts"][0]
    assert (answer["max_model_len"], answer["token_strs"]) == (8192, None)
    assert text_of(server, answer["tokens"]) == BEGIN + TEXT
    plain = tokenize(server, prompt=TEXT, add_special_tokens=False)
    assert plain["tokens"] == answer["tokens"][1:]


def test_tokens_as_the_tokenizer_spells_them(server: Any) -> None:
    answer = tokenize(server, prompt="Hello there", return_token_strs=True)
    assert len(answer["token_strs"]) == answer["count"]
    assert answer["token_strs"][0] == BEGIN
    assert "".join(answer["token_strs"][1:]) == "HelloĠthere"


@pytest.mark.parametrize("text", ["", "Grüße, 你好! 🎉", "a <|eot_id|> b\n\n c "])
def test_text_comes_back_as_it_was(server: Any, text: str) -> None:
    tokens = tokenize(server, prompt=text, add_special_tokens=False)["tokens"]
    assert text_of(server, tokens) == text
    end_of_turn = TextTokenizer.from_folder(Path(server.engine.info.tokenizer_folder)).token_id(
        "<|eot_id|>"
    )
    assert end_of_turn not in tokens


def test_what_a_speech_request_becomes(server: Any) -> None:
    answer = tokenize(server, input=TEXT, voice="en_man", instructions="Calm.", speed=1.5, seed=3)
    prompt = text_of(server, answer["tokens"])
    assert prompt.startswith(BEGIN + header("system") + "Generate audio following instruction.")
    assert "Audio is recorded from a quiet room.\nCalm." in prompt
    assert prompt.endswith(
        header("user") + "Hello there.<|eot_id|>" + header("assistant") + "<|audio_out_bos|>"
    )
    assert answer["parts"] == [answer["count"]]


def clip(seconds: float = 1.0) -> str:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(24_000)
        file.writeframes(b"\1\0" * int(24_000 * seconds))
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_clip_takes_the_positions_that_it_will_take(server: Any) -> None:
    words = "What the clip says."
    answer = tokenize(server, input=TEXT, ref_audio=clip(), ref_text=words, return_token_strs=True)
    assert answer["token_strs"].count("<|AUDIO_OUT|>") == 25 + 9  # frames, and the delay's
    turn = {
        "role": "assistant",
        "content": [{"type": "input_audio", "input_audio": {"data": clip()}}],
    }
    messages = [{"role": "user", "content": words}, turn, {"role": "user", "content": TEXT}]
    by_chat = tokenize(server, messages=messages, add_generation_prompt=True)
    assert by_chat["tokens"] == answer["tokens"]


def test_a_chat_is_what_it_would_speak(server: Any) -> None:
    messages = [
        {"role": "system", "content": "The speaker is happy."},
        {"role": "user", "content": TEXT},
    ]
    audio = {"voice": "en_man"}
    by_chat = tokenize(server, messages=messages, audio=audio, continue_final_message=False)
    by_speech = tokenize(server, input=TEXT, voice="en_man", instructions="The speaker is happy.")
    assert by_chat == by_speech


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        ("Ha [laugh]", {}, "Ha <SE>[Laughter]</SE>"),
        ("Ha <SE>[Laughter]</SE> ha", {}, "Ha <SE>[Laughter]</SE> ha."),
        ("[humming start] m [humming end]", {}, "<SE_s>[Humming]</SE_s> m <SE_e>[Humming]</SE_e>"),
        ("Ha [laugh]", {"normalize": False}, "Ha [laugh]"),
        ("Ha <SE>", {}, "Ha."),
    ],
)
def test_sounds_are_tokens_of_the_model(
    server: Any, text: str, fields: dict[str, Any], expected: str
) -> None:
    answer = tokenize(server, input=text, **fields, return_token_strs=True)
    spoken = text_of(server, answer["tokens"]).rpartition(header("user"))[2]
    assert spoken.startswith(expected + "<|eot_id|>")
    marks = ("<SE>", "</SE>", "<SE_s>", "</SE_s>", "<SE_e>", "</SE_e>")
    num_marks = sum(answer["token_strs"].count(mark) for mark in marks)
    assert num_marks == sum(expected.count(mark) for mark in marks)


def test_speakers_without_clips_are_described(server: Any) -> None:
    engine = server.engine
    old, young = (
        dataclasses.replace(engine.voices.resolve(name), scene=scene)
        for name, scene in (("en_man", "An old man."), ("de_man", "A boy."))
    )
    engine.voices._voices |= {"en_man": old, "de_man": young}
    voices = {"SPEAKER1": "de_man", "SPEAKER0": "onyx", "SPEAKER2": "en_woman"}
    answer = tokenize(server, input="[SPEAKER0] Hi. [SPEAKER1] Ho.", voices=voices)
    prompt = text_of(server, answer["tokens"])
    assert "\n\nSPEAKER0: An old man.\nSPEAKER1: A boy.\n<|scene_desc_end|>" in prompt
    assert "SPEAKER2" not in prompt
    assert header("user") + "[SPEAKER0] Hi. [SPEAKER1] Ho.<|eot_id|>" in prompt


def test_a_long_text_is_several_prompts(server: Any) -> None:
    answer = tokenize(server, input="One two three four five six seven eight nine ten. " * 20)
    assert len(answer["parts"]) > 2
    assert sum(answer["parts"]) == answer["count"]
    assert text_of(server, answer["tokens"]).count(BEGIN) == len(answer["parts"])


def test_nothing_is_spoken_or_counted(server: Any) -> None:
    tokenize(server, input=TEXT)
    assert server.engine.seen == []
    assert server.client.get("/stats").json()["total_requests"] == 0


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "one of prompt, messages and input is needed, not none"),
        ({"prompt": "a", "input": "b"}, "input", "not prompt and input"),
        ({"prompt": 5}, "prompt", "prompt=5 is not allowed"),
        ({"prompt": "a\ud800"}, "prompt", "lone surrogate"),
        ({"prompt": "a" * 100_001}, "prompt", "prompt has 100001 characters"),
        ({"input": "a", "voice": "nobody"}, "voice", "voice 'nobody' is unknown"),
        ({"input": "a", "speed": 9}, "speed", "speed=9 is not allowed"),
        ({"input": 5}, "input", "input=5 is not allowed"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": "a"}], "n": 2}, "n", "n=2 makes no sense"),
        ({"input": "a", "add_special_tokens": True}, "add_special_tokens", "the form of the"),
        ({"prompt": "a", "chat_template": "x"}, "chat_template", "one form of prompts"),
        ({"input": "a", "add_generation_prompt": False}, "add_generation_prompt", "always ends"),
        ({"input": "a", "continue_final_message": True}, "continue_final_message", "of its own"),
    ],
)
def test_a_wrong_body_is_refused(server: Any, body: dict[str, Any], param: str, words: str) -> None:
    raw = json.dumps(body)
    reply = server.client.post(
        "/tokenize", content=raw, headers={"Content-Type": "application/json"}
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert words in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([5, 10**6], "tokens[1]=1000000 is no id of this model; they go from 0 to"),
        ([-1], "greater than or equal to 0"),
        (["a"], "valid integer"),
        ("abc", "valid list"),
        (None, "valid list"),
    ],
)
def test_wrong_tokens_are_refused(server: Any, tokens: Any, words: str) -> None:
    error = refusal(server, "/detokenize", {"tokens": tokens})
    assert error["param"] == "tokens"
    assert words in error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_an_unknown_model_is_not_found(server: Any, path: str) -> None:
    body = {"prompt": "a", "tokens": [1], "model": "gpt"}
    assert refusal(server, path, body, 404)["param"] == "model"


def test_a_key_is_needed_and_the_model_must_be_there(start_server: Any, fake_engine: Any) -> None:
    server = start_server(None, "--api-key", "k")
    assert server.client.post("/tokenize", json={"prompt": "a"}).status_code == 401
    engine = fake_engine()
    engine.may_start.clear()
    loading = start_server(engine, wait_ready=False)
    assert loading.client.post("/tokenize", json={"prompt": "a"}).status_code == 503
    assert loading.client.post("/detokenize", json={"tokens": [1]}).status_code == 503
    engine.may_start.set()
