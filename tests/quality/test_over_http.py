"""The embedded model behind the server: voices, seeds, formats, speed, streams, the first curl."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks._judges import count_word_errors, normal_words
from training.lexicon import load_lexicon
from vllm.audio import decode_clip

pytestmark = pytest.mark.timeout(600)  # where other work runs

RATE = 24_000
TEXT = "This is a fast water."
OTHERS = ["en_man", "de_woman", "de_man", "zh_woman", "zh_man"]


def speak(client: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"input": TEXT, "seed": 7, "response_format": "pcm", **fields}
    reply = client.post("/v1/audio/speech", json=body)
    assert reply.status_code == 200, reply.text
    return reply


def samples_of(pcm: bytes) -> np.ndarray:
    return np.frombuffer(pcm, "<i2").astype(np.float32) / 32768


def test_all_six_voices_are_listed_and_say_whether_they_speak(client):
    voices = client.get("/v1/audio/voices").json()["voices"]
    assert {each["id"]: each["speaks"] for each in voices} == {
        "en_woman": True,
        **dict.fromkeys(OTHERS, False),
    }


@pytest.mark.parametrize("voice", OTHERS)
def test_a_voice_that_does_not_speak_is_spoken_by_the_default_one(client, voice):
    default, reply = speak(client), speak(client, voice=voice)
    assert reply.headers["X-Voice"] == "en_woman"
    assert reply.headers["X-Voice-Fallback"] == voice
    assert reply.content == default.content
    assert default.headers["X-Voice"] == "en_woman"
    assert "X-Voice-Fallback" not in default.headers


def test_the_voice_that_speaks_is_no_stand_in(client):
    reply = speak(client, voice="en_woman")
    assert reply.headers["X-Voice"] == "en_woman"
    assert "X-Voice-Fallback" not in reply.headers


def test_a_clip_speaks_at_once_and_as_an_uploaded_voice(client):
    said = "This is a test."
    wav = speak(client, input=said, response_format="wav").content
    inline = speak(client, ref_audio=base64.b64encode(wav).decode(), ref_text=said)
    uploaded = client.post(
        "/v1/audio/voices",
        data={"name": "clip", "ref_text": said, "consent": "yes"},
        files={"audio_sample": ("clip.wav", wav, "audio/wav")},
    )
    assert uploaded.status_code in (200, 201), uploaded.text
    by_voice = speak(client, voice="clip")
    assert client.delete("/v1/audio/voices/clip").status_code in (200, 204)
    assert by_voice.headers["X-Voice"] == "clip"
    assert "X-Voice-Fallback" not in by_voice.headers
    seconds = len(samples_of(inline.content)) / RATE
    plain = len(samples_of(speak(client).content)) / RATE
    assert 0.6 < seconds / plain < 1.6
    assert by_voice.content == inline.content


def test_equal_seeds_are_equal_bytes_and_others_are_not(client):
    assert speak(client).content == speak(client).content
    assert speak(client).content != speak(client, seed=8).content


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream_format": "audio"}])
def test_a_stream_has_the_bytes_of_the_file(client, fields):
    body = {"input": TEXT, "seed": 7, "response_format": "pcm", **fields}
    with client.stream("POST", "/v1/audio/speech", json=body) as reply:
        assert reply.status_code == 200
        streamed = b"".join(reply.iter_bytes())
    assert streamed == speak(client).content


@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_speed_changes_the_length(client, speed):
    plain, spoken = speak(client), speak(client, speed=speed)
    assert len(spoken.content) == pytest.approx(len(plain.content) / speed, rel=0.02)


def test_what_is_heard_of_mp3_is_what_is_heard_of_pcm(client, hear):
    """At 128 kbit/s, in the words of the recogniser, whatever the model said."""
    plain = samples_of(speak(client).content)
    reply = speak(client, response_format="mp3")
    compressed = decode_clip(reply.content, sample_rate=RATE)
    assert len(compressed) == pytest.approx(len(plain), abs=RATE // 5)
    heard = hear(plain, RATE)
    assert len(heard) >= 3
    assert count_word_errors(heard, hear(compressed, RATE)) <= 1 + len(heard) // 4


def first_curl(readme: str) -> dict[str, Any]:
    found = re.search(r"curl -X POST \S+/v1/audio/speech.*?-d '(\{.*?\})'", readme, re.DOTALL)
    assert found
    body: dict[str, Any] = json.loads(found[1])
    return body


def test_the_first_curl_says_words_of_the_vocabulary_in_a_voice_that_speaks(client, repo_root):
    body = first_curl((repo_root / "README.md").read_text(encoding="utf-8"))
    assert body["voice"] == "en_woman"
    assert set(normal_words(body["input"])) <= set(load_lexicon())
    reply = client.post("/v1/audio/speech", json=body)
    assert reply.status_code == 200
    assert reply.headers["Content-Type"].startswith("audio/mpeg")
    assert "X-Voice-Fallback" not in reply.headers
    assert 1.0 < len(decode_clip(reply.content, sample_rate=RATE)) / RATE < 6.0
