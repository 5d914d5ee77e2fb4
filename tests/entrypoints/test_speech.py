"""The speech route in front of a stand-in engine: formats, headers, streams, endings."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import wave
from collections.abc import AsyncGenerator
from typing import Any

import av
import httpx
import numpy as np
import pytest

from vllm.audio import lookup
from vllm.entrypoints.bosonai.speech_reply import AudioFacts, Ending, Reply
from vllm.exceptions import EngineError, OverloadedError
from vllm.outputs import FinishReason, SpeechOutput, SpeechStats, Usage

RATE = 24_000
TEXT = "Hello there."
NUM_SAMPLES = len(TEXT) * 2 * 960
FORMATS = {
    "mp3": "audio/mpeg",
    "opus": "audio/opus",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
END_HEADERS = {
    "x-usage-prompt-tokens": "12",
    "x-usage-completion-tokens": "32",
    "x-usage-audio-tokens": "24",
    "x-usage-total-tokens": "44",
    "x-audio-duration-seconds": "0.9600",
    "x-processing-time-seconds": "0.5000",
    "x-realtime-factor": "1.9200",
    "x-rtf": "0.5208",
    "x-finish-reason": "stop",
}


def speak(server: Any, **fields: Any) -> httpx.Response:
    reply: httpx.Response = server.client.post("/v1/audio/speech", json={"input": TEXT, **fields})
    return reply


def decode(data: bytes, name: str) -> np.ndarray:
    if name == "pcm":
        return np.frombuffer(data, "<i2").astype(np.float32) / 32768
    with av.open(io.BytesIO(data)) as container:
        rate = container.streams.audio[0].rate
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    samples = np.concatenate(frames, axis=1)[0]
    scale = 32768 if samples.dtype == np.int16 else 1
    return samples[:: rate // RATE].astype(np.float32) / scale


def pcm(server: Any, **fields: Any) -> bytes:
    return speak(server, response_format="pcm", **fields).content


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stream", [None, False])
def test_every_format_decodes_to_the_whole_audio(live: Any, name: str, stream: bool | None) -> None:
    reply = speak(live, response_format=name, stream=stream, seed=3)
    assert reply.headers["content-type"] == FORMATS[name]
    samples = decode(reply.content, name)
    assert NUM_SAMPLES <= len(samples) + 1 <= NUM_SAMPLES + 4096
    middle = samples[RATE // 4 : RATE // 2]
    assert np.sqrt((middle**2).mean()) == pytest.approx(0.5 / 2**0.5, abs=0.02)


@pytest.mark.parametrize("name", FORMATS)
def test_equal_requests_give_equal_bytes(live: Any, name: str) -> None:
    first, second = (speak(live, response_format=name, seed=3).content for _ in range(2))
    assert first == second


def test_mp3_is_the_default_and_streamed(live: Any) -> None:
    reply = speak(live)
    assert reply.headers["content-type"] == "audio/mpeg"
    assert "content-length" not in reply.headers
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"


def test_streamed_and_buffered_samples_are_equal(live: Any) -> None:
    assert pcm(live, seed=9) == pcm(live, seed=9, stream=False)


def test_a_stream_tells_what_is_known_at_its_start(live: Any) -> None:
    headers = speak(live, seed=7, voice="onyx").headers
    assert headers["x-seed"] == "7"
    assert headers["x-voice"] == "en_man"
    assert (headers["x-sample-rate"], headers["x-channels"]) == ("24000", "1")
    assert "x-finish-reason" not in headers


def test_a_drawn_seed_is_reported(live: Any) -> None:
    assert speak(live).headers["x-seed"] == "4711"


def test_ids_of_voices_that_no_header_can_hold(start_server: Any, fake_engine: Any) -> None:
    ids = ("en_woman", "小明", "Jörg\n(2) 50%")
    server = start_server(fake_engine(voice_names=ids))
    heard = []
    for name in ids:
        reply = server.client.post("/v1/audio/speech", json={"input": "Hi.", "voice": name})
        assert reply.status_code == 200, reply.text[:300]
        heard.append(reply.headers["x-voice"])
    assert heard == ["en_woman", "%E5%B0%8F%E6%98%8E", "J%C3%B6rg%0A(2)%2050%25"]


def test_a_complete_file_tells_everything(live: Any) -> None:
    reply = speak(live, stream=False, response_format="wav")
    assert reply.headers["content-length"] == str(len(reply.content))
    assert {name: reply.headers[name] for name in END_HEADERS} == END_HEADERS


def test_a_complete_wav_has_its_true_length(live: Any) -> None:
    data = speak(live, stream=False, response_format="wav").content
    with wave.open(io.BytesIO(data)) as file:
        assert file.getnframes() == NUM_SAMPLES


@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_speed_changes_the_length(live: Any, speed: float) -> None:
    reply = speak(live, response_format="pcm", speed=speed, stream=False)
    assert len(reply.content) == 2 * round(NUM_SAMPLES / speed)
    seconds = float(reply.headers["x-audio-duration-seconds"])
    assert seconds == pytest.approx(NUM_SAMPLES / RATE / speed, abs=1e-3)


def test_audio_arrives_before_the_engine_is_done(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(holds_at=1))
    body = {"input": TEXT, "response_format": "pcm"}
    with server.client.stream("POST", "/v1/audio/speech", json=body) as reply:
        pieces = reply.iter_raw()
        num_bytes = len(next(pieces))
        assert server.engine._open == 1
        server.engine.go_on.set()
        assert num_bytes + sum(map(len, pieces)) == 2 * NUM_SAMPLES


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


@pytest.mark.parametrize("name", FORMATS)
def test_sse_pieces_form_the_streamed_file(live: Any, name: str) -> None:
    reply = speak(live, stream_format="sse", response_format=name, seed=5)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply.text)
    assert [kind for kind, _ in events[:-1]] == ["speech.audio.delta"] * (len(events) - 1)
    data = b"".join(base64.b64decode(payload["audio"]) for _, payload in events[:-1])
    assert data == speak(live, response_format=name, seed=5).content


def test_events_fit_into_the_lines_that_clients_read() -> None:
    piece = bytes(range(250)) * 800

    async def no_outputs() -> AsyncGenerator[SpeechOutput]:
        return
        yield

    class SlowSpeech(Reply):
        async def audio(self) -> AsyncGenerator[bytes]:
            yield piece

        def ending(self) -> Ending:
            return Ending(FinishReason.STOP, Usage(), SpeechStats(), seed=1)

    async def read() -> list[str]:
        reply = SlowSpeech(AudioFacts(lookup("pcm"), 24_000, "a", 1), no_outputs(), {})
        return b"".join([event async for event in reply.events()]).decode().splitlines()

    lines = asyncio.run(read())
    assert max(map(len, lines)) < 2**16
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert b"".join(base64.b64decode(event.get("audio", "")) for event in events) == piece


def test_sse_ends_with_usage_and_stats(live: Any) -> None:
    kind, done = events_of(speak(live, stream_format="sse", seed=5).text)[-1]
    assert kind == done["type"] == "speech.audio.done"
    assert done["usage"]["input_tokens"] == 12
    assert done["usage"]["output_tokens"] == 32
    assert done["usage"]["total_tokens"] == 44
    assert done["stats"]["audio_duration_seconds"] == 0.96
    assert (done["finish_reason"], done["seed"]) == ("stop", 5)


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.SILENCE])
def test_the_finish_reason_is_told(
    start_server: Any, fake_engine: Any, reason: FinishReason
) -> None:
    server = start_server(fake_engine(finish_reason=reason))
    assert speak(server, stream=False).headers["x-finish-reason"] == reason.value


@pytest.mark.parametrize("fields", [{}, {"stream": False}, {"stream_format": "sse"}])
def test_a_failure_before_the_first_audio_is_a_500(
    start_server: Any, fake_engine: Any, fields: dict[str, Any]
) -> None:
    server = start_server(fake_engine(fail_before=EngineError("the row is broken")))
    reply = speak(server, **fields)
    assert reply.status_code == 500
    assert reply.headers["x-should-retry"] == "false"
    assert reply.json()["error"] == {
        "message": "the row is broken",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }


def test_an_unexpected_failure_is_a_500_without_its_text(
    start_server: Any, fake_engine: Any
) -> None:
    server = start_server(fake_engine(fail_before=RuntimeError("secret")))
    reply = speak(server)
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert reply.headers["x-request-id"]


def test_an_overload_says_when_to_come_back(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(fail_before=OverloadedError("full", retry_after_s=7)))
    reply = speak(server)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "7")


def test_no_audio_at_all_is_a_failure(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(finish_reason=FinishReason.LENGTH))
    reply = speak(server, max_tokens=8)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "max_tokens")
    server.engine.finish_reason = FinishReason.STOP
    reply = speak(server, max_tokens=8)
    assert reply.status_code == 500
    assert "no audio" in reply.json()["error"]["message"]


@pytest.mark.parametrize("error", [EngineError("broken"), RuntimeError("broken")])
def test_a_failure_after_the_first_audio_breaks_the_reply_off(
    start_server: Any, fake_engine: Any, error: Exception
) -> None:
    server = start_server(fake_engine(fail_after=error))
    body = {"input": TEXT, "response_format": "pcm"}
    with server.client.stream("POST", "/v1/audio/speech", json=body) as reply:
        assert reply.status_code == 200
        received: list[bytes] = []
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            received.extend(reply.iter_raw())
    data = b"".join(received)
    assert len(data) == 2 * 4 * 960
    assert b"broken" not in data
    server.engine.fail_after = None
    assert speak(server).status_code == 200


def test_a_failure_after_the_first_audio_is_an_sse_event(
    start_server: Any, fake_engine: Any
) -> None:
    server = start_server(fake_engine(fail_after=EngineError("broken")))
    kind, payload = events_of(speak(server, stream_format="sse").text)[-1]
    assert kind == "speech.audio.error"
    assert payload["error"]["message"] == "broken"


def test_a_failure_of_a_buffered_reply_is_a_500(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(fail_after=EngineError("broken")))
    assert speak(server, stream=False).status_code == 500


@pytest.mark.parametrize("fields", [{}, {"stream_format": "sse"}])
def test_a_client_that_leaves_a_stream_aborts_it(
    start_server: Any, fake_engine: Any, fields: dict[str, Any]
) -> None:
    server = start_server(fake_engine(holds_at=1))
    body = {"input": TEXT, **fields}
    with server.client.stream("POST", "/v1/audio/speech", json=body) as reply:
        pieces = reply.iter_raw()
        next(pieces)
    server.wait_until(lambda: len(server.engine.aborted) == 1)
    assert server.engine._open == 0
    counted = 'request_success_total{finished_reason="abort",model_name="tts-test"} 1.0'
    server.wait_until(lambda: counted in server.client.get("/metrics").text)


@pytest.mark.parametrize(("holds_at", "stream"), [(1, False), (0, None)])
def test_a_client_that_leaves_before_the_reply_aborts_it(
    start_server: Any, fake_engine: Any, holds_at: int, stream: bool | None
) -> None:
    server = start_server(fake_engine(holds_at=holds_at))
    with server.asking({"input": TEXT, "stream": stream}):
        server.wait_until(lambda: server.engine._open == 1)
    server.wait_until(lambda: len(server.engine.aborted) == 1)


def test_a_request_that_takes_too_long_is_told_so(start_server: Any, fake_engine: Any) -> None:
    server = start_server(
        fake_engine(finish_reason=FinishReason.DEADLINE), "--request-timeout", "2500"
    )
    assert speak(server, stream=False).headers["x-finish-reason"] == "deadline"
    assert 0 < server.engine.timeouts[0] <= 2500
    assert speak(server, max_tokens=8).status_code == 503


def test_request_fields_reach_the_engine(start_server: Any) -> None:
    server = start_server()
    speak(
        server,
        voice="de_man",
        language="de",
        instructions="whisper",
        system_prompt="S",
        normalize=False,
        temperature=0.3,
        ras_win_len=0,
        max_new_tokens=50,
    )
    prompt, params, request_id = server.engine.seen[-1]
    assert (prompt.text, prompt.voice.voice_id, prompt.language) == (TEXT, "de_man", "de")
    assert (prompt.instructions, prompt.system_prompt) == ("whisper", "S")
    assert prompt.normalize is False
    assert (params.temperature, params.max_tokens, params.uses_ras) == (0.3, 50, False)
    assert request_id.startswith("audiospeech-")


def test_equal_request_ids_do_not_collide(start_server: Any) -> None:
    server = start_server()
    for _ in range(2):
        reply = server.client.post(
            "/v1/audio/speech", json={"input": "a"}, headers={"X-Request-Id": "mine"}
        )
        assert reply.headers["x-request-id"] == "mine"
    ids = [request_id for _, _, request_id in server.engine.seen]
    assert len(set(ids)) == 2
    assert all("mine" in request_id for request_id in ids)


def clip_base64(seconds: float = 0.5) -> str:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.full(int(16_000 * seconds), 1000, "<i2").tobytes())
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("prefix", ["", "data:audio/wav;base64,"])
def test_a_clip_of_the_request_is_decoded_at_the_codecs_rate(
    start_server: Any, prefix: str
) -> None:
    server = start_server()
    reply = speak(server, ref_audio=prefix + clip_base64(), ref_text="Words.")
    assert reply.headers["x-voice"] == "custom"
    prompt = server.engine.seen[-1][0]
    assert len(prompt.ref_audio) == 13 * 960
    assert prompt.ref_text == "Words."


@pytest.mark.parametrize(
    "clip", ["not base64!", "AAAA", "http://127.0.0.1:1/x.wav", "file:///etc/hostname"]
)
def test_clips_that_cannot_be_had_are_named(live: Any, clip: str) -> None:
    reply = speak(live, ref_audio=clip, ref_text="Words.")
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "ref_audio"


def test_a_clip_needs_a_codec_that_encodes(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(can_encode=False))
    reply = speak(server, ref_audio=clip_base64(), ref_text="Words.")
    assert reply.status_code == 400
    assert "cannot encode" in reply.json()["error"]["message"]


def test_file_urls_below_the_allowed_folder(start_server: Any, tmp_path: Any) -> None:
    (tmp_path / "in").mkdir()
    for place in (tmp_path / "in" / "clip.wav", tmp_path / "out.wav"):
        place.write_bytes(base64.b64decode(clip_base64()))
    server = start_server(None, "--allowed-local-media-path", str(tmp_path / "in"))
    inside = speak(server, ref_audio=f"file://{tmp_path}/in/clip.wav", ref_text="W.")
    outside = speak(server, ref_audio=f"file://{tmp_path}/in/../out.wav", ref_text="W.")
    assert (inside.status_code, outside.status_code) == (200, 400)


def test_http_urls_where_they_are_allowed(start_server: Any) -> None:
    server = start_server(None, "--allow-ref-audio-urls", "--allow-private-ref-audio-urls")
    reply = speak(server, ref_audio=f"{server.url}/version", ref_text="W.")
    assert reply.status_code == 400  # fetched, and no audio
    assert "fetched" not in reply.json()["error"]["message"]
    reply = speak(server, ref_audio=f"{server.url}/nowhere", ref_text="W.")
    assert "status 404" in reply.json()["error"]["message"]


DIALOGUE = "[SPEAKER0] Hi. [SPEAKER1] Ho."


def test_each_speaker_has_a_voice(start_server: Any) -> None:
    server = start_server()
    voices = {"SPEAKER0": "onyx", "SPEAKER1": {"id": "de_man"}, "SPEAKER2": "en_woman"}
    reply = speak(server, input=DIALOGUE, voices=voices, voice="alloy")
    assert reply.status_code == 200
    assert reply.headers["x-voice"] == "en_man,de_man"
    prompt = server.engine.seen[-1][0]
    heard = {speaker: voice.voice_id for speaker, voice in prompt.voices.items()}
    assert heard == {"SPEAKER0": "en_man", "SPEAKER1": "de_man", "SPEAKER2": "en_woman"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"voices": {"SPEAKER0": "onyx"}}, "voices", "names SPEAKER1, who has no voice"),
        ({"voices": {"SPEAKER0": "x", "SPEAKER1": "onyx"}}, "voices", "voices.SPEAKER0: voice 'x'"),
        ({"voices": {"A": "onyx"}}, "voices", "names 'A'; its keys are SPEAKER0"),
        ({"voices": {"SPEAKER0": 5}}, "voices", "voices=5 is not allowed"),
        ({"voices": ["onyx"]}, "voices", "should be a valid dictionary"),
        ({"voices": {f"SPEAKER{i}": "onyx" for i in range(17)}}, "voices", "at most 16"),
        ({"input": "Hi.", "voices": {"SPEAKER0": "onyx"}}, "input", "as [SPEAKER0]"),
    ],
)
def test_voices_that_do_not_fit_are_refused(
    live: Any, fields: dict[str, Any], param: str, words: str
) -> None:
    reply = speak(live, **{"input": DIALOGUE, **fields})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert words in reply.json()["error"]["message"]


def test_no_voices_are_as_none(live: Any) -> None:
    plain = pcm(live, seed=3)
    assert pcm(live, seed=3, voices=None) == pcm(live, seed=3, voices={}) == plain


SCENE = "<|scene_desc_start|>\nAn old man whispers.\n<|scene_desc_end|>"


@pytest.mark.parametrize(
    ("fields", "heard"),
    [
        ({"system_prompt": SCENE}, "scene"),
        ({"system_prompt": SCENE, "voice": "de_man"}, "de_man"),
        ({"system_prompt": "Convert text to speech."}, "en_woman"),
        ({"instructions": SCENE}, "en_woman"),
    ],
)
def test_a_scene_prompt_describes_the_voice_where_none_is_named(
    live: Any, fields: dict[str, str], heard: str
) -> None:
    assert speak(live, **fields).headers["x-voice"] == heard
    assert live.engine.seen[-1][0].voice.voice_id == heard
    request = {"text": TEXT, **fields}
    assert live.client.post("/generate", json=request).headers["x-voice"] == heard


@pytest.mark.parametrize("name", ["ref_audio", "reference_audio_base64"])
def test_errors_name_fields_as_the_client_spelt_them(live: Any, name: str) -> None:
    error = speak(live, **{name: "!"}, ref_text="a").json()["error"]
    assert error["param"] == name
    assert error["message"].startswith(f"{name} is not valid base64")
