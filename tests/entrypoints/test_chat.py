"""Chat completions in front of a stand-in engine: prompts, answers, chunks, references, refusals."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import wave
from collections.abc import Iterator
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest

from vllm.entrypoints.bosonai.recent_replies import RecentReplies
from vllm.exceptions import EngineError
from vllm.outputs import FinishReason
from vllm.prompts import PromptClip, SpokenTurn

TEXT = "Hello there."
NUM_SAMPLES = len(TEXT) * 2 * 960
USER = {"role": "user", "content": TEXT}


def wav(num_samples: int = 24_000, rate: int = 24_000) -> str:
    """A clip as base64."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.full(num_samples, 1000, "<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode()


def chat(server: Any, *messages: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {"messages": messages or [USER], **fields}
    reply: httpx.Response = server.client.post("/v1/chat/completions", json=body)
    return reply


def answer(server: Any, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    reply = chat(server, *messages, **fields)
    assert reply.status_code == 200, reply.text
    content: dict[str, Any] = reply.json()
    return content


def audio_of(content: dict[str, Any]) -> dict[str, Any]:
    audio: dict[str, Any] = content["choices"][0]["message"]["audio"]
    return audio


def refusal(server: Any, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    reply = chat(server, *messages, **fields)
    assert reply.status_code == 400, reply.text
    error: dict[str, Any] = reply.json()["error"]
    return error


def chunks_of(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = reply.text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def spoken(part: str, clip: str) -> list[dict[str, Any]]:
    """A reference: words, and the clip that speaks them."""
    kinds = {
        "input_audio": {"data": clip, "format": "wav"},
        "audio_url": {"url": f"data:audio/wav;base64,{clip}"},
    }
    audio = {"type": part, part: kinds[part]}
    return [
        {"role": "user", "content": "Good day."},
        {"role": "assistant", "content": [audio]},
    ]


# -- plain answers


def test_the_example_of_older_documents(live: Any) -> None:
    scene = "The speaker sounds excited and happy."
    system = (
        "Generate audio following instruction.\n\n"
        f"<|scene_desc_start|>\n{scene}\n<|scene_desc_end|>"
    )
    content = answer(
        live,
        {"role": "system", "content": system},
        {"role": "user", "content": "Hello, this is amazing!"},
        model="tts-test",
        max_tokens=2048,
        temperature=0.5,
    )
    data = base64.b64decode(audio_of(content)["data"])
    with wave.open(io.BytesIO(data)) as file:
        assert file.getnframes() == len("Hello, this is amazing!") * 2 * 960
    prompt, params, _ = live.engine.seen[-1]
    assert (prompt.text, prompt.system_prompt) == ("Hello, this is amazing!", system)
    assert (params.max_tokens, params.temperature) == (2048, 0.5)


def test_a_plain_answer(live: Any) -> None:
    before = int(time.time())
    reply = chat(live, model="tts-1", seed=7)
    content = reply.json()
    assert content["id"].startswith("chatcmpl-")
    assert (content["object"], content["model"]) == ("chat.completion", "tts-1")
    assert before <= content["created"] <= time.time()
    [choice] = content["choices"]
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "stop", "stop")
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] is None
    audio = choice["message"]["audio"]
    assert audio["transcript"] == TEXT
    assert audio["id"].startswith("audio-")
    assert content["usage"] == {
        "prompt_tokens": 12,
        "completion_tokens": 32,
        "total_tokens": 44,
        "prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": 0},
        "completion_tokens_details": {"audio_tokens": 24},
    }
    assert content["stats"]["audio_duration_seconds"] == pytest.approx(0.96)
    assert content["stats"]["realtime_factor"] == pytest.approx(1.92)
    assert (reply.headers["x-seed"], reply.headers["x-finish-reason"]) == ("7", "stop")


@pytest.mark.parametrize("name", ["wav", "aac", "mp3", "flac", "opus"])
def test_formats(live: Any, name: str) -> None:
    data = base64.b64decode(audio_of(answer(live, audio={"format": name}))["data"])
    with av.open(io.BytesIO(data)) as container:
        seconds = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    assert seconds == pytest.approx(NUM_SAMPLES / 24_000, abs=0.1)


def test_pcm16_holds_the_samples_of_the_speech_route(live: Any) -> None:
    data = base64.b64decode(audio_of(answer(live, audio={"format": "pcm16"}, seed=5))["data"])
    body = {"input": TEXT, "response_format": "pcm", "seed": 5}
    assert data == live.client.post("/v1/audio/speech", json=body).content


@pytest.mark.parametrize("reason", ["length", "max_audio", "silence", "text_length"])
def test_an_answer_that_was_cut_says_so(start_server: Any, fake_engine: Any, reason: str) -> None:
    server = start_server(fake_engine(finish_reason=FinishReason(reason)))
    content = answer(server)
    [choice] = content["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", reason)
    assert len(base64.b64decode(audio_of(content)["data"])) == 44 + 2 * NUM_SAMPLES


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_audio(live: Any, stream: bool) -> None:
    reply = chat(live, max_tokens=3, stream=stream)  # the stand-in then stops at once
    if stream:
        first, last = chunks_of(reply)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
    else:
        last = reply.json()
        assert audio_of(last) is None
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens_details"]["audio_tokens"] == 0


# -- what reaches the engine


@pytest.mark.parametrize(
    ("voice", "heard"), [("en_man", "en_man"), ("onyx", "en_man"), ({"id": "de_man"}, "de_man")]
)
def test_voices(live: Any, voice: Any, heard: str) -> None:
    assert chat(live, audio={"voice": voice}).headers["x-voice"] == heard


def test_sampling_fields(live: Any) -> None:
    fields = {"temperature": 0.3, "top_p": 0.9, "top_k": 20, "seed": 3, "eos_rule": "reference"}
    answer(live, **fields, max_completion_tokens=40, ras_win_len=5, ras_max_num_repeat=3)
    params = live.engine.seen[-1][1]
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.max_tokens, params.ras_params) == (40, (5, 3))


def test_ras_can_be_switched_off(live: Any) -> None:
    answer(live, ras_window_length=None)
    assert not live.engine.seen[-1][1].uses_ras


@pytest.mark.parametrize(
    "text",
    [
        "<|scene_desc_start|>\nA hall.\n<|scene_desc_end|>",
        "Convert text to speech with the same voice.",
        "You are an AI assistant designed to convert text into speech.",
    ],
)
def test_a_system_text_in_the_models_form_replaces_the_whole(live: Any, text: str) -> None:
    answer(live, {"role": "system", "content": text}, USER)
    prompt = live.engine.seen[-1][0]
    assert (prompt.system_prompt, prompt.instructions) == (text, None)


SCENE = "Generate audio.\n\n<|scene_desc_start|>\nAn old man whispers.\n<|scene_desc_end|>"


@pytest.mark.parametrize(
    ("text", "voice", "heard"),
    [
        (SCENE, None, "scene"),
        (SCENE, "de_man", "de_man"),
        ("You are a helpful assistant.", None, "en_woman"),
        ("An old man whispers.", None, "en_woman"),
    ],
)
def test_a_scene_prompt_describes_the_voice_where_none_is_named(
    live: Any, text: str, voice: str | None, heard: str
) -> None:
    audio = {} if voice is None else {"audio": {"voice": voice}}
    body = {"messages": [{"role": "system", "content": text}, USER], **audio}
    reply = live.client.post("/v1/chat/completions", json=body)
    assert reply.headers["x-voice"] == heard
    assert live.engine.seen[-1][0].voice.voice_id == heard


def test_a_plain_system_text_describes_the_scene(live: Any) -> None:
    system = [{"role": "system", "content": "A hall."}, {"role": "developer", "content": "Calm."}]
    answer(live, *system, USER)
    prompt = live.engine.seen[-1][0]
    assert (prompt.system_prompt, prompt.instructions) == (None, "A hall.\n\nCalm.")


def test_speaker_tags_stay_in_the_text(live: Any) -> None:
    parts = [{"type": "text", "text": "[SPEAKER0] Hi."}, {"type": "text", "text": "[SPEAKER1] Ho."}]
    content = answer(live, {"role": "user", "content": parts})
    assert live.engine.seen[-1][0].text == "[SPEAKER0] Hi.\n[SPEAKER1] Ho."
    assert audio_of(content)["transcript"] == "[SPEAKER0] Hi.\n[SPEAKER1] Ho."


# -- references


@pytest.mark.parametrize("part", ["input_audio", "audio_url"])
def test_a_reference_turn_is_cloned(live: Any, part: str) -> None:
    reply = chat(live, *spoken(part, wav(48_000, 48_000)), USER)
    assert reply.headers["x-voice"] == "custom"
    prompt = live.engine.seen[-1][0]
    assert (prompt.text, prompt.ref_text) == (TEXT, "Good day.")
    assert (prompt.ref_audio.size, prompt.history) == (24_000, ())


def test_further_reference_turns_follow_the_first(live: Any) -> None:
    answer(live, *spoken("input_audio", wav()), *spoken("input_audio", wav(1920)), USER)
    prompt = live.engine.seen[-1][0]
    assert prompt.ref_audio.size == 24_000
    [turn] = prompt.history
    assert (turn.text, turn.clip.num_frames, turn.clip.samples.size) == ("Good day.", 2, 1920)


def test_an_earlier_reply_is_named_by_its_id(live: Any) -> None:
    first = audio_of(answer(live))
    assert first["expires_at"] > time.time() + 3000
    history = [USER, {"role": "assistant", "content": None, "audio": first}]
    reply = chat(live, *history, {"role": "user", "content": "And now?"}, audio={"voice": "onyx"})
    assert reply.headers["x-voice"] == "en_man"
    prompt = live.engine.seen[-1][0]
    [turn] = prompt.history
    assert (prompt.text, prompt.voice.voice_id, prompt.ref_audio) == ("And now?", "en_man", None)
    assert (turn.text, turn.clip.codes.shape) == (TEXT, (8, 24))


def test_an_id_that_is_not_kept(live: Any) -> None:
    error = refusal(live, USER, {"role": "assistant", "audio": {"id": "audio-0"}}, USER)
    assert error["message"].startswith("messages[1]: audio.id='audio-0' names no reply")
    assert error["param"] == "messages"


def test_a_reply_is_its_clients_own(start_server: Any) -> None:
    server = start_server(None, "--api-key", "one", "two")
    headers = [{"Authorization": f"Bearer {key}"} for key in ("one", "two")]

    def ask(index: int, *messages: Any) -> httpx.Response:
        body = {"messages": messages}
        return server.client.post("/v1/chat/completions", json=body, headers=headers[index])

    audio = {"id": audio_of(ask(0, USER).json())["id"]}
    turns = [USER, {"role": "assistant", "audio": audio}, USER]
    assert [ask(0, *turns).status_code, ask(1, *turns).status_code] == [200, 400]


def turn_of(num_frames: int) -> SpokenTurn:
    return SpokenTurn("", PromptClip(num_frames, codes=np.zeros((8, num_frames), np.int16)))


def test_kept_replies_expire() -> None:
    now = 1000.0
    replies = RecentReplies(kept_s=60, clock=lambda: now)
    assert replies.keep("a", turn_of(1), "") == 1060
    now = 1059.0
    assert replies.find("a", "") is not None
    now = 1060.0
    assert replies.find("a", "") is None


def test_no_promise_is_broken_for_lack_of_room() -> None:
    now = 1000.0
    replies = RecentReplies(max_bytes=40, kept_s=60, clock=lambda: now)
    assert replies.keep("a", turn_of(2), "") == 1060
    assert replies.keep("b", turn_of(1), "") == 1000
    assert replies.find("a", "") is not None
    assert replies.find("b", "") is None
    now = 1060.0
    assert replies.keep("b", turn_of(2), "") == 1120


# -- refusals


@pytest.mark.parametrize(
    ("messages", "wording"),
    [
        ([], "at least 1 item"),
        ([{"role": "user", "content": " "}], "messages end without a user's text"),
        ([{"role": "system", "content": "A hall."}], "messages end without a user's text"),
        ([*spoken("input_audio", "AAAA")], "messages end without a user's text"),
        ([{"role": "assistant", "content": "x"}, USER], r"messages\[0\] .* with no audio"),
        ([*spoken("input_audio", "AAAA")[1:], USER], r"messages\[0\] has audio without a trans"),
        ([*spoken("input_audio", "AAAA"), USER], r"messages\[1\]: ref_audio"),
        ([*spoken("audio_url", "!")[:1], {"role": "assistant", "content": [
            {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1/x.wav"}}]}, USER],
         "this server fetches no URLs"),
        ([{**spoken("input_audio", "AAAA")[1], "role": "user"}], "cannot listen to"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
        ([{"role": "tool", "content": "x"}, USER], "role|tool"),
        ([{"role": "user", "content": "x" * 100_001}], "has 100001 characters"),
    ],
)  # fmt: skip
def test_conversations_that_fit_no_rule(live: Any, messages: list[Any], wording: str) -> None:
    num_seen = len(live.engine.seen)
    reply = live.client.post("/v1/chat/completions", json={"messages": messages})
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert re.search(wording, error["message"]), error
    assert error["param"] == "messages"
    assert len(live.engine.seen) == num_seen


INERT: dict[str, tuple[Any, Any]] = {
    "n": (1, 2),
    "best_of": (1, 2),
    "use_beam_search": (False, True),
    "length_penalty": (1.0, 0.5),
    "min_p": (0, 0.1),
    "presence_penalty": (0, 0.5),
    "frequency_penalty": (0.0, -0.5),
    "repetition_penalty": (1.0, 1.1),
    "logit_bias": ({}, {"5": 1}),
    "logprobs": (False, True),
    "top_logprobs": (0, 5),
    "prompt_logprobs": (None, 1),
    "bad_words": ([], ["no"]),
    "allowed_token_ids": ([], [1]),
    "min_tokens": (0, 5),
    "ignore_eos": (False, True),
    "echo": (False, True),
    "tools": ([], [{"type": "function"}]),
    "tool_choice": ("auto", "required"),
    "functions": ([], [{"name": "f"}]),
    "function_call": ("none", {"name": "f"}),
    "web_search_options": (None, {}),
    "response_format": ({"type": "text"}, {"type": "json_object"}),
    "structured_outputs": ({}, {"json": {}}),
    "guided_json": (None, {}),
    "guided_regex": (None, "a"),
    "guided_choice": (None, ["a"]),
    "guided_grammar": (None, "g"),
    "prediction": (None, {"type": "content", "content": "x"}),
}


@pytest.mark.parametrize("name", INERT)
def test_fields_without_meaning_are_refused_by_name(live: Any, name: str) -> None:
    num_seen = len(live.engine.seen)
    error = refusal(live, **{name: INERT[name][1]})
    assert f"{name}=" in error["message"]
    assert "makes no sense for audio: " in error["message"]
    assert error["param"] == name
    assert len(live.engine.seen) == num_seen


def test_neutral_values_of_such_fields_are_taken(live: Any) -> None:
    content = answer(live, **{name: values[0] for name, values in INERT.items()})
    assert audio_of(content)["data"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modalities": ["text"]}, "modalities"),
        ({"modalities": ["image"]}, "modalities"),
        ({"audio": {"voice": "nobody"}}, "audio.voice"),
        ({"audio": {"format": "ogg"}}, "audio.format"),
        ({"audio": {"format": "mp3"}, "stream": True}, "audio.format"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_fields_out_of_range(live: Any, fields: dict[str, Any], param: str) -> None:
    assert refusal(live, **fields)["param"] == param


def test_an_unknown_model(live: Any) -> None:
    assert chat(live, model="gpt-9").status_code == 404


def test_a_codec_without_encoder_clones_nothing(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(can_encode=False))
    error = refusal(server, *spoken("input_audio", wav()), USER)
    assert "cannot encode" in error["message"]


def test_a_failure_before_the_first_audio(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(fail_before=EngineError("broken")))
    reply = chat(server, stream=True)
    assert (reply.status_code, reply.json()["error"]["message"]) == (500, "broken")


# -- streams


def deltas_of(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]


def test_a_streamed_answer(live: Any) -> None:
    reply = chat(live, stream=True, seed=5, audio={"voice": "onyx", "format": "pcm16"})
    assert (reply.headers["x-voice"], reply.headers["cache-control"]) == ("en_man", "no-cache")
    chunks = chunks_of(reply)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    first, *audio, end = deltas_of(chunks)
    assert (first["role"], first["content"]) == ("assistant", None)
    assert first["audio"]["transcript"] == TEXT
    assert first["audio"]["id"].startswith("audio-")
    assert [set(delta["audio"]) for delta in audio[:-1]] == [{"data"}] * 6
    assert set(audio[-1]["audio"]) == {"expires_at"}
    assert end == {}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"audio_tokens": 24}
    assert chunks[-1]["stats"]["audio_duration_seconds"] == pytest.approx(0.96)
    data = base64.b64decode("".join(delta["audio"]["data"] for delta in audio[:-1]))
    plain = answer(live, seed=5, audio={"format": "pcm16"})
    assert data == base64.b64decode(audio_of(plain)["data"])


def test_usage_has_a_chunk_of_its_own_where_asked_for(live: Any) -> None:
    chunks = chunks_of(chat(live, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 44
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_a_streamed_reply_can_be_named_later(live: Any) -> None:
    first, *_ = deltas_of(chunks_of(chat(live, stream=True)))
    audio = {"id": first["audio"]["id"]}
    answer(live, USER, {"role": "assistant", "audio": audio}, USER)
    assert live.engine.seen[-1][0].history[0].text == TEXT


def test_a_failure_amid_a_stream_is_an_event(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(fail_after=EngineError("broken")))
    chunks = chunks_of(chat(server, stream=True))
    assert chunks[-1]["error"]["message"] == "broken"
    assert "data" in deltas_of(chunks[:-1])[-1]["audio"]


def test_a_client_that_leaves_ends_its_request(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(holds_at=1))
    body = {"messages": [USER], "stream": True}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as reply:
        pieces = reply.iter_raw()
        next(pieces)
    server.wait_until(lambda: server.engine.aborted)
    assert server.engine._open == 0


# -- OpenAI's own client


@pytest.fixture(scope="module")
def client(live: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="dummy", max_retries=0) as client:
        yield client


def test_openai_package(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model="tts-1",
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": "wav"},
        messages=[{"role": "user", "content": TEXT}],
    )
    [choice] = completion.choices
    assert (choice.finish_reason, choice.message.content) == ("stop", None)
    assert choice.message.audio is not None
    assert base64.b64decode(choice.message.audio.data).startswith(b"RIFF")
    assert choice.message.audio.transcript == TEXT
    assert completion.usage is not None
    assert completion.usage.completion_tokens_details is not None
    assert completion.usage.completion_tokens_details.audio_tokens == 24


def test_openai_package_streamed(client: openai.OpenAI) -> None:
    data, ids, transcript, expires_at = b"", [], "", 0
    for chunk in client.chat.completions.create(
        model="tts-1",
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": "pcm16"},
        messages=[{"role": "user", "content": TEXT}],
        stream=True,
        stream_options={"include_usage": True},
    ):
        audio = chunk.choices[0].delta.audio if chunk.choices else None
        if audio is not None:
            data += base64.b64decode(audio.data or "")
            ids += [audio.id] if audio.id else []
            transcript += audio.transcript or ""
            expires_at = audio.expires_at or 0
    assert (len(data), len(ids), transcript) == (2 * NUM_SAMPLES, 1, TEXT)
    assert expires_at > time.time()
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == 32


def test_openai_package_adds_the_deltas_up(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tts-1",
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": "pcm16"},
        messages=[{"role": "user", "content": TEXT}],
    ) as stream:
        audio = stream.get_final_completion().choices[0].message.audio
    assert audio is not None
    assert len(base64.b64decode(audio.data, validate=True)) == 2 * NUM_SAMPLES
    assert audio.transcript == TEXT
    reply = client.chat.completions.create(
        model="tts-1",
        messages=[
            {"role": "user", "content": TEXT},
            {"role": "assistant", "audio": {"id": audio.id}},
            {"role": "user", "content": "And now?"},
        ],
    )
    assert reply.choices[0].message.audio is not None


def test_openai_package_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="n=2 makes no sense") as caught:
        client.chat.completions.create(
            model="tts-1", n=2, messages=[{"role": "user", "content": TEXT}]
        )
    assert caught.value.param == "n"


def test_openai_package_hears_of_a_failure_amid_a_stream(
    start_server: Any, fake_engine: Any
) -> None:
    server = start_server(fake_engine(fail_after=EngineError("broken")))
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client,
        pytest.raises(openai.APIError, match="broken"),
    ):
        list(
            client.chat.completions.create(
                model="tts-1", messages=[{"role": "user", "content": TEXT}], stream=True
            )
        )


def test_speakers_of_a_chat_have_voices(start_server: Any) -> None:
    server = start_server()
    line = {"role": "user", "content": "[SPEAKER0] Hi."}
    reply = chat(server, line, audio={"voices": {"SPEAKER0": "onyx"}})
    assert reply.headers["x-voice"] == "en_man"
    prompt = server.engine.seen[-1][0]
    assert prompt.voices["SPEAKER0"].voice_id == "en_man"
    error = refusal(server, line, audio={"voices": {"SPEAKER0": "nobody"}})
    assert error["param"] == "audio.voices"
    assert "voices.SPEAKER0: voice 'nobody' is unknown" in error["message"]


def test_a_clip_goes_before_the_speakers(start_server: Any) -> None:
    server = start_server()
    line = {"role": "user", "content": "[SPEAKER0] Hi."}
    turns = [*spoken("input_audio", wav()), line]
    reply = chat(server, *turns, audio={"voices": {"SPEAKER0": "onyx"}})
    assert reply.status_code == 200
    prompt = server.engine.seen[-1][0]
    assert prompt.ref_audio is None
    assert len(prompt.history) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"audio": {"format": "xyz"}}, "audio.format"),
        ({"audio": {"voice": 3}}, "audio.voice"),
        ({"audio": 3}, "audio"),
        ({"stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
        ({"messages": [{"role": "nobody", "content": "Hi."}]}, "messages"),
        ({"stop": [3]}, "stop"),
    ],
)
def test_a_field_of_a_field_is_named_in_full(live: Any, fields: dict[str, Any], param: str) -> None:
    body = {"messages": [USER], **fields}
    reply = live.client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
