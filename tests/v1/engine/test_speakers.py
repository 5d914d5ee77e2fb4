"""Several speakers in one text: what each voice becomes, and who speaks where a text is split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vllm.prompts import PromptClip, SpeechPrompt, SpokenTurn, Voice
from vllm.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=24, seed=3)
HOP = 960


def cloned(name: str, num_frames: int, seed: int) -> Voice:
    samples = np.random.default_rng(seed).normal(0, 0.1, num_frames * HOP).astype(np.float32)
    return Voice(name, name, transcript=name, clip=PromptClip(num_frames, samples=samples))


def delayed(items: list[Any]) -> list[list[int]]:
    return np.concatenate([item.delayed_codes for item in items]).tolist()


def test_a_speakers_clip_is_a_turn_before_the_text(make_driver: Callable[..., Any]) -> None:
    driver = make_driver()
    first, second = cloned("Good day.", 4, 1), cloned("Good night.", 6, 2)
    text = "[SPEAKER1] Hi. [SPEAKER0] Ho."
    voices = {"SPEAKER1": second, "SPEAKER0": first, "SPEAKER9": cloned("Unheard.", 5, 3)}
    spoken = driver.speak(SpeechPrompt(text=text, voices=voices), PARAMS)
    assert spoken[-1].usage.prompt_audio_tokens == 10
    history = [
        SpokenTurn(f"[SPEAKER{index}] {voice.transcript}", voice.clip)
        for index, voice in enumerate((first, second))
        if voice.clip is not None
    ]
    by_history = driver.speak(SpeechPrompt(text=text, history=history), PARAMS)
    assert delayed(spoken) == delayed(by_history)
    swapped = {"SPEAKER0": second, "SPEAKER1": first}
    assert delayed(driver.speak(SpeechPrompt(text=text, voices=swapped), PARAMS)) != delayed(spoken)


def test_every_part_of_a_long_turn_names_its_speaker(make_driver: Callable[..., Any]) -> None:
    driver = make_driver()
    turn = "One two three four five six seven eight nine ten eleven twelve. " * 8
    voices = {"SPEAKER0": cloned("a", 3, 1), "SPEAKER1": Voice("b", "B", scene="Old.")}
    prompt = SpeechPrompt(text=f"[SPEAKER0] {turn}[SPEAKER1] {turn}", voices=voices)
    spoken = driver.speak(prompt, SamplingParams(max_tokens=200, seed=3, max_audio_s=1.0))
    assert spoken[-1].stats.num_parts >= 4
    # the speaker of each part, as the processor hands it on
    parts = [part.text for part in driver.processor.process("r", prompt, PARAMS)._parts]
    assert all(part.startswith(("[SPEAKER0] ", "[SPEAKER1] ")) for part in parts)
    tags = "".join(part[8] for part in parts)
    assert tags.strip("0").strip("1") == ""
    assert "01" in tags


def test_parts_are_as_short_as_the_voice_that_speaks_least_at_once(
    make_driver: Callable[..., Any],
) -> None:
    driver = make_driver()
    text = "[SPEAKER0] One two three four. [SPEAKER1] Five six seven. Eight nine ten. Eleven."
    voices = {
        "SPEAKER0": Voice("a", "A", scene="Old."),
        "SPEAKER1": Voice("b", "B", scene="Young.", max_chars=40),
    }
    prompt = SpeechPrompt(text=text, voices=voices)
    parts = [part.text for part in driver.processor.process("r", prompt, PARAMS)._parts]
    assert parts == [
        "[SPEAKER0] One two three four.",
        "[SPEAKER1] Five six seven.",
        "[SPEAKER1] Eight nine ten. Eleven.",
    ]


def test_a_clip_is_spoken_in_parts_as_short_as_those_of_the_default_voice(
    make_driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = make_driver().processor
    default = processor._voices.resolve(None)
    monkeypatch.setattr(processor._voices, "resolve", lambda _voice: replace(default, max_chars=20))
    prompt = SpeechPrompt(
        text="One two three. Four five six.", ref_audio=np.zeros(960, np.float32), ref_text="Hi."
    )
    parts = [part.text for part in processor.process("r", prompt, PARAMS)._parts]
    assert parts == ["One two three.", "Four five six."]
