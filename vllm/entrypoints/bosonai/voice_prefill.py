"""Encodes and prefills voices before anybody asks for them: uploads, and those named at start.

What the engine then keeps, and for how long, is the scheduler's business; requests work the same
without any of this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from vllm.entrypoints.bosonai.voice_store import new_id
from vllm.entrypoints.server_config import ALL_VOICES
from vllm.exceptions import HiggsAudioError
from vllm.logger import get_logger
from vllm.prompts import SpeechPrompt, Voice
from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllm.entrypoints.bosonai.engine_host import EngineClient
    from vllm.entrypoints.bosonai.voices import VoiceLibrary

__all__ = ["prefill_pinned", "prefill_voice"]

logger = get_logger(__name__)

_TEXT = "a"  # what a voice says that nobody hears


async def prefill_voice(engine: EngineClient, name: str) -> None:
    """Prefill the prompt of a voice; a failure is logged and left to the next request for it."""
    try:
        await _speak_once(engine, await _resolve(engine, name))
    except HiggsAudioError as error:
        logger.info("voice %s could not be prepared: %s", name, error)


async def prefill_pinned(engine: EngineClient, names: Sequence[str], *, block_size: int) -> None:
    """Prefill the prompts of voices, as many as can be pinned together; the log says which not.

    Args:
        engine: that has started.
        names: ids or aliases, or ``ALL_VOICES`` for presets and uploads; the first come first.
        block_size: positions per block of the engine's KV cache.
    """
    if not names:
        return
    assert engine.info is not None, "an engine that has started has its info"
    assert engine.processor is not None, "an engine that has started has its processor"
    limit = engine.info.max_pinned_blocks
    num_blocks: dict[str, int] = {}  # voice id -> blocks
    for name in await _names(engine) if ALL_VOICES in names else names:
        try:
            voice = await _resolve(engine, name)
            if voice.voice_id in num_blocks:
                continue
            (prompt,) = engine.processor.prompts_of(SpeechPrompt(text=_TEXT, voice=voice))
            needed = prompt.num_voice_positions // block_size
            taken = sum(num_blocks.values())
            if taken + needed > limit:
                logger.warning(
                    "--pinned-voices: %s needs %d blocks of %d positions, but %d of %d that may be "
                    "pinned are taken; name fewer voices, or raise --kv-cache-memory",
                    name,
                    needed,
                    block_size,
                    taken,
                    limit,
                )
                continue
            await _speak_once(engine, voice)
            num_blocks[voice.voice_id] = needed
        except HiggsAudioError as error:
            logger.warning("--pinned-voices: %s could not be prepared: %s", name, error)
        if engine.is_dead:
            return
    logger.info(
        "prompts of %d voices take %d of %d blocks that may be pinned",
        len(num_blocks),
        sum(num_blocks.values()),
        limit,
    )


async def _names(engine: EngineClient) -> Sequence[str]:
    """Ids of the presets, and of uploads unless their store cannot be asked."""
    voices = _library(engine)
    loop = asyncio.get_running_loop()
    try:
        return await loop.run_in_executor(voices.store_threads, lambda: voices.names)
    except HiggsAudioError as error:
        logger.warning("--pinned-voices: uploads are left out: %s", error)
        return voices.preset_names()


async def _resolve(engine: EngineClient, name: str) -> Voice:
    voices = _library(engine)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(voices.store_threads, voices.resolve, name)


async def _speak_once(engine: EngineClient, voice: Voice) -> None:
    # The first frame is the start code, which needs no model; the second needs the prompt.
    source = engine.generate(
        SpeechPrompt(text=_TEXT, voice=voice),
        SamplingParams(max_tokens=2),
        f"warm-{voice.voice_id}-{new_id()[:8]}",
    )
    async with aclosing(source):
        async for _ in source:
            pass


def _library(engine: EngineClient) -> VoiceLibrary:
    assert engine.voices is not None, "an engine that has started has its voices"
    return engine.voices
