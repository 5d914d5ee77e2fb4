"""Speech engine in the shape of vLLM V1: text in, streamed audio out.

The names below are the public Python API. They are loaded at first use, so that importing a
server module does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.entrypoints.async_llm import AsyncLLM
    from vllm.entrypoints.llm import LLM
    from vllm.outputs import FinishReason, SpeechOutput, SpeechStats, Usage
    from vllm.prompts import SpeechPrompt
    from vllm.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "FinishReason",
    "SamplingParams",
    "SpeechOutput",
    "SpeechPrompt",
    "SpeechStats",
    "Usage",
    "__version__",
]

_HOMES = {
    "LLM": "vllm.entrypoints.llm",
    "AsyncLLM": "vllm.entrypoints.async_llm",
    "FinishReason": "vllm.outputs",
    "SamplingParams": "vllm.sampling_params",
    "SpeechOutput": "vllm.outputs",
    "SpeechPrompt": "vllm.prompts",
    "SpeechStats": "vllm.outputs",
    "Usage": "vllm.outputs",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
