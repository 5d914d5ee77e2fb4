"""Turns spoken before as context of a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vllm.exceptions import InvalidRequestError
from vllm.prompts import PromptClip, SpeechPrompt, SpokenTurn
from vllm.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=24, seed=3)
HOP = 960


def noise(num_frames: int) -> np.ndarray:
    return np.random.default_rng(5).normal(0, 0.1, num_frames * HOP).astype(np.float32)


def delayed(items: list[Any]) -> list[list[int]]:
    return np.concatenate([item.delayed_codes for item in items]).tolist()


def test_a_turn_spoken_before_is_what_a_reference_is(make_driver: Callable[..., Any]) -> None:
    driver = make_driver()
    clip = noise(6)
    turn = SpokenTurn("Good day.", PromptClip(6, samples=clip))
    by_history = driver.speak(SpeechPrompt(text="Hello.", history=(turn,)), PARAMS)
    by_reference = driver.speak(
        SpeechPrompt(text="Hello.", ref_audio=clip, ref_text="Good day."), PARAMS
    )
    plain = driver.speak(SpeechPrompt(text="Hello."), PARAMS)
    assert delayed(by_history) == delayed(by_reference) != delayed(plain)
    assert by_history[-1].usage.prompt_audio_tokens == 6
    assert plain[-1].usage.prompt_audio_tokens == 0


def test_an_answer_can_be_a_turn_of_the_next_prompt(make_driver: Callable[..., Any]) -> None:
    driver = make_driver()
    items = driver.speak(SpeechPrompt(text="Hello."), PARAMS)
    codes = np.concatenate([item.codes for item in items], axis=1)
    turn = SpokenTurn("Hello.", PromptClip(codes.shape[1], codes=codes))
    reference = {"ref_audio": noise(6), "ref_text": "Good day."}
    prompt = SpeechPrompt(text="And now?", history=(turn,), **reference)
    usage = driver.speak(prompt, PARAMS)[-1].usage
    assert usage.prompt_audio_tokens == codes.shape[1] + 6


@pytest.mark.parametrize(
    "clip",
    [
        PromptClip(3, codes=np.zeros((4, 2), np.int16)),
        PromptClip(0, codes=np.zeros((8, 0), np.int16)),
        PromptClip(3, samples=np.zeros(100, np.float32)),
    ],
)
def test_a_clip_of_a_wrong_shape_is_refused(
    make_driver: Callable[..., Any], clip: PromptClip
) -> None:
    prompt = SpeechPrompt(text="Hello.", history=(SpokenTurn("a", clip),))
    with pytest.raises(InvalidRequestError, match=r"history\[0\] has a clip of shape"):
        make_driver().speak(prompt, PARAMS)
