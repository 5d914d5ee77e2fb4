"""``vllm.AsyncLLM``: a model by name, as ``vllm.LLM`` has it, with audio while it is made."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from vllm import LLM, AsyncLLM, FinishReason, SamplingParams, SpeechOutput, SpeechPrompt
from vllm.exceptions import ConfigError, EngineDeadError

PROMPT = SpeechPrompt(text="Good morning.", voice="en_woman")
PARAMS = SamplingParams(seed=42)


def test_it_speaks_as_the_offline_engine_does() -> None:
    async def speak() -> list[SpeechOutput]:
        async with AsyncLLM(device="cpu") as llm:
            parts = [part async for part in llm.generate(PROMPT, PARAMS, "greeting")]
        assert llm.is_dead
        with pytest.raises(EngineDeadError, match="make a new AsyncLLM"):
            await llm.start()
        return parts

    parts = asyncio.run(speak())
    assert len(parts) > 1
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].finish_reason is FinishReason.STOP
    whole = LLM(device="cpu").generate(PROMPT, PARAMS, use_tqdm=False)[0]
    codes = np.concatenate([part.codes for part in parts], axis=1)
    np.testing.assert_array_equal(codes, whole.codes)
    np.testing.assert_allclose(np.concatenate([p.audio for p in parts]), whole.audio, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "words"),
    [({"speed": 2}, "unknown option: speed"), ({"voices_dir": "nowhere"}, "nowhere")],
)
def test_wrong_options_are_refused_at_once(option: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AsyncLLM(**option)
