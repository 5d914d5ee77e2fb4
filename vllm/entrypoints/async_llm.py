"""The engine for asyncio programs: a model by name, its voices, and audio while it is made.

Adds to ``v1.engine.async_llm`` what a program without a server needs, and knows no HTTP.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vllm.config import EngineConfig
from vllm.entrypoints.bosonai.voices import VoiceLibrary, check_presets
from vllm.v1.engine import async_llm
from vllm.v1.engine.messages import EngineInfo

__all__ = ["AsyncLLM"]


class AsyncLLM(async_llm.AsyncLLM[VoiceLibrary]):
    """A speech model in a process of its own, started and stopped by ``async with``.

    Args:
        model: Hub id or folder; None is the embedded model.
        audio_tokenizer: Hub id or folder of the codec; None is the published one, or the embedded
            model's own.
        voices_dir: folder of voice presets; None takes the shipped ones.
        default_voice: voice of prompts that name none.
        **options: any option of ``EngineConfig``, by the name of its flag.

    Raises:
        ConfigError: an option is unknown or wrong.

    Example:
        >>> async with AsyncLLM(device="cpu") as llm:
        ...     async for part in llm.generate(SpeechPrompt(text="Hello."), SamplingParams(), "r1"):
        ...         play(part.audio)
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        audio_tokenizer: str | Path | None = None,
        voices_dir: str | Path | None = None,
        default_voice: str | None = None,
        **options: Any,
    ) -> None:
        config = EngineConfig.from_options(
            model=None if model is None else str(model),
            audio_tokenizer_type=None if audio_tokenizer is None else str(audio_tokenizer),
            **options,
        )
        folder = None if voices_dir is None else Path(voices_dir)
        check_presets(config, folder, default_voice=default_voice)

        def make_voices(info: EngineInfo) -> VoiceLibrary:
            return VoiceLibrary.for_engine(info, folder=folder, default_voice=default_voice)

        super().__init__(config, make_voices)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.shutdown()
