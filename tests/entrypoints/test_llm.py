"""``vllm.LLM`` as scripts use it: from several threads, and after its end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vllm import LLM, FinishReason, SamplingParams, SpeechOutput
from vllm.exceptions import EngineDeadError


def test_threads_take_turns_and_a_call_after_the_end_is_refused() -> None:
    llm = LLM(device="cpu", max_num_seqs=2)

    def speak(seed: int) -> SpeechOutput:
        return llm.generate("Good morning.", SamplingParams(seed=seed), use_tqdm=False)[0]

    alone = [speak(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(speak, range(3)))
    for one, other in zip(alone, together, strict=True):
        assert other.finish_reason is FinishReason.STOP
        np.testing.assert_array_equal(one.codes, other.codes)
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="make a new LLM"):
        speak(0)
