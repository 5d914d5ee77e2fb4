"""The request body: spellings, defaults, and how it becomes sampling parameters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm.config import SpeechDefaults
from vllm.entrypoints.openai.protocol import AudioSpeechRequest
from vllm.sampling_params import SamplingParams

SERVER = SpeechDefaults(ras_window_length=5, ras_max_num_repeat=3, ras_mode="block")


def make_params(**fields: Any) -> SamplingParams:
    return AudioSpeechRequest(input="Hi.", **fields).to_sampling_params(SERVER)


def test_defaults_are_the_models_and_the_servers() -> None:
    params = make_params()
    assert params == SamplingParams(
        ras_window_length=5, ras_max_num_repeat=3, ras_mode="block", max_tokens=None
    )


def test_nulls_mean_not_given() -> None:
    body = AudioSpeechRequest(
        input="Hi.",
        model=None,
        voice=None,
        response_format=None,
        speed=None,
        stream=None,
        stream_format=None,
        temperature=None,
        top_p=None,
        top_k=None,
        seed=None,
        max_tokens=None,
        stop=None,
        normalize=None,
    )
    assert body.audio_format == "mp3"
    assert body.speed_factor == 1.0
    assert body.wants_stream
    assert body.to_sampling_params(SERVER) == make_params()


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens", "max_completion_tokens"])
def test_every_spelling_of_max_tokens(name: str) -> None:
    assert make_params(**{name: 99}).max_tokens == 99


@pytest.mark.parametrize("name", ["ras_window_length", "ras_win_len"])
def test_every_spelling_of_the_ras_window(name: str) -> None:
    assert make_params(**{name: 9}).ras_params == (9, 3)


@pytest.mark.parametrize("name", ["ras_max_num_repeat", "ras_win_max_num_repeat"])
def test_every_spelling_of_the_ras_repeats(name: str) -> None:
    assert make_params(**{name: 4}).ras_params == (5, 4)


@pytest.mark.parametrize("value", [0, None])
@pytest.mark.parametrize(
    "name", ["ras_window_length", "ras_win_len", "ras_max_num_repeat", "ras_win_max_num_repeat"]
)
def test_zero_or_null_switches_ras_off(name: str, value: int | None) -> None:
    assert not make_params(**{name: value}).uses_ras


def test_equal_spellings_may_be_given_together() -> None:
    assert make_params(ras_win_len=6, ras_window_length=6).ras_window_length == 6


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 9, "max_new_tokens": 10},
        {"ras_window_length": 7, "ras_win_len": None},
        {"ref_text": "a", "reference_text": "b", "ref_audio": "AAAA"},
    ],
)
def test_contradicting_spellings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="name the same thing but differ"):
        AudioSpeechRequest(input="Hi.", **fields)


@pytest.mark.parametrize(
    "fields",
    [{"min_p": 0.0}, {"repetition_penalty": 1.0}, {"presence_penalty": None}],
)
def test_neutral_values_of_meaningless_fields_pass(fields: dict[str, Any]) -> None:
    assert make_params(**fields) == make_params()


def test_a_stop_string_may_stand_alone() -> None:
    assert make_params(stop="x").stop == ("x",)
    assert make_params(stop=["x", "y"]).stop == ("x", "y")


def test_unknown_fields_are_kept_by_name() -> None:
    body = AudioSpeechRequest(input="Hi.", logit_bias={}, audio_chunk_size=25)
    assert body.unknown_fields == ("audio_chunk_size", "logit_bias")


def test_voice_as_an_object() -> None:
    body = AudioSpeechRequest.model_validate({"input": "Hi.", "voice": {"id": "en_man"}})
    assert body.voice_name == "en_man"


def test_both_spellings_of_a_reference() -> None:
    body = AudioSpeechRequest(input="a", reference_audio_base64="AAAA", reference_text="t")
    assert (body.reference_audio, body.reference_transcript) == ("AAAA", "t")


def test_a_clip_needs_words() -> None:
    with pytest.raises(ValidationError, match="ref_text is missing"):
        AudioSpeechRequest(input="a", ref_audio="AAAA", ref_text=" ")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(sorted(AudioSpeechRequest.model_fields)),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=True)
        | st.text(max_size=5)
        | st.lists(st.text(max_size=3), max_size=2),
        max_size=6,
    )
)
def test_a_body_that_passes_makes_valid_params(fields: dict[str, Any]) -> None:
    try:
        body = AudioSpeechRequest.model_validate({"input": "Hi.", **fields})
    except ValidationError:
        return
    params = body.to_sampling_params(SERVER)
    assert 0 <= params.ras_window_length <= 64
    assert params.temperature >= 0
    assert body.speed_factor > 0
