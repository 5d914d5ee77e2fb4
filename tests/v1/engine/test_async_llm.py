"""The engine in its own process: streams, aborts, deadlines, and its death."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from vllm import FinishReason, SamplingParams, SpeechPrompt
from vllm.config import EngineConfig
from vllm.entrypoints.bosonai.engine_host import EngineHost
from vllm.exceptions import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    RequestAbortedError,
)
from vllm.outputs import SpeechOutput
from vllm.prompts import Voice
from vllm.v1.engine import async_llm
from vllm.v1.engine.async_llm import AsyncLLM

HELLO = SpeechPrompt(text="Hello there.")
# Minutes of work for any machine (see ``started``), so that none is done before a test has acted.
ENDLESS = SpeechPrompt(text="A sentence that is not very long. " * 3000)


class NoVoice:
    def resolve(self, voice: str | None) -> Voice:
        return Voice("plain", "Plain")


@asynccontextmanager
async def started(checkpoint: Path, **options: Any) -> AsyncIterator[AsyncLLM[NoVoice]]:
    # The context is long and the audio unlimited: either would end an endless text early.
    config = EngineConfig.from_options(
        model=str(checkpoint / "lm"),
        audio_tokenizer_type=str(checkpoint / "codec"),
        device="cpu",
        max_num_seqs=16,
        max_model_len=8192,
        **{"max_audio_seconds": 0.0, **options},
    )
    llm = AsyncLLM(config, lambda info: NoVoice())
    await llm.start()
    try:
        yield llm
    finally:
        await llm.shutdown()


async def collect(
    llm: AsyncLLM[NoVoice],
    request_id: str,
    params: SamplingParams,
    prompt: SpeechPrompt = HELLO,
    **options: Any,
) -> list[SpeechOutput]:
    return [item async for item in llm.generate(prompt, params, request_id, **options)]


def audio_of(items: list[SpeechOutput]) -> bytes:
    return b"".join(item.audio.tobytes() for item in items)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(400):
            await test()

    asyncio.run(bounded())


def test_one_process_serves_many_requests_alike(checkpoint: Path) -> None:
    async def test() -> None:
        async with started(checkpoint) as llm:
            assert llm.is_ready
            params = SamplingParams(seed=7, max_tokens=60)
            alone = await collect(llm, "a", params)
            assert [item.finished for item in alone].count(True) == 1
            assert alone[0].audio.size == 4 * 960, "the first chunk is short"
            crowd = [
                collect(llm, "same-id", SamplingParams(seed=index, max_tokens=40 + index))
                for index in range(15)
            ]
            *_, among = await asyncio.gather(*crowd, collect(llm, "same-id", params))
            assert audio_of(among) == audio_of(alone)
            assert among[-1].request_id != "same-id", "ids of open requests are kept apart"

            raw = SpeechPrompt(prompt_token_ids=[1, 10**6])
            with pytest.raises(InvalidRequestError, match="prompt_token_ids"):
                await anext(aiter(llm.generate(raw, params, "bad")))

            for index in range(8):  # parts take milliseconds: some deadline meets the end of one
                expired = await collect(
                    llm, "late", SamplingParams(seed=index), ENDLESS, timeout_s=0.05 + index / 100
                )
                assert expired[-1].finish_reason is FinishReason.DEADLINE

            stream = llm.generate(ENDLESS, SamplingParams(seed=1), "left")
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            while (
                llm.engine_stats().scheduler.num_running
                or llm.engine_stats().scheduler.num_finishing
            ):
                await asyncio.sleep(0.05)
            assert llm.engine_stats().scheduler.kv_cache_usage == 0

            waiting = asyncio.create_task(collect(llm, "ended", SamplingParams(seed=1), ENDLESS))
            while not llm.engine_stats().scheduler.num_running:
                await asyncio.sleep(0.01)
            await llm.abort("ended")
            assert (await waiting)[-1].finish_reason is FinishReason.ABORT

    run(test)


def test_a_long_text_is_one_stream(checkpoint: Path) -> None:
    async def test() -> None:
        async with started(checkpoint, max_audio_seconds=3.0) as llm:
            prompt = SpeechPrompt(text="A sentence that is not very long. " * 20)
            params = SamplingParams(seed=3)
            items = [item async for item in llm.generate(prompt, params, "long")]
            assert items[-1].finish_reason is FinishReason.MAX_AUDIO
            assert items[-1].usage.audio_tokens == 75
            assert items[-1].stats.num_parts > 1

    run(test)


def test_death_ends_every_stream(checkpoint: Path) -> None:
    async def test() -> None:
        async with started(checkpoint) as llm:
            streams = [
                asyncio.create_task(collect(llm, str(seed), SamplingParams(seed=seed), ENDLESS))
                for seed in range(3)
            ]
            while llm.engine_stats().scheduler.num_running < 3:
                await asyncio.sleep(0.01)
            assert llm._client.pid is not None
            os.kill(llm._client.pid, signal.SIGKILL)
            for result in await asyncio.gather(*streams, return_exceptions=True):
                assert isinstance(result, EngineDeadError)
            await llm.wait_dead()
            assert llm.is_dead
            with pytest.raises(EngineDeadError):
                await llm.check_health()
            with pytest.raises(EngineDeadError):
                await collect(llm, "after", SamplingParams())

    run(test)


def test_streams_hear_of_the_death_before_a_new_engine_starts(checkpoint: Path) -> None:
    async def test() -> None:
        async with started(checkpoint) as llm:
            stream = asyncio.create_task(collect(llm, "open", SamplingParams(seed=1), ENDLESS))
            while not llm.engine_stats().scheduler.num_running:
                await asyncio.sleep(0.01)
            assert llm._client.pid is not None
            os.kill(llm._client.pid, signal.SIGKILL)
            await llm.wait_dead()
            await llm.shutdown()
            with pytest.raises(EngineDeadError, match="has died"):
                await stream

    run(test)


def test_an_engine_that_hangs_does_not_outlive_its_server(checkpoint: Path) -> None:
    async def test() -> None:
        async with started(checkpoint) as llm:
            host = EngineHost(lambda: llm)
            pid = llm._client.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            await host.close()
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    run(test)


def test_an_engine_that_hangs_is_known_by_its_silence(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait_for(llm: AsyncLLM[Any], state: bool) -> None:
        async with asyncio.timeout(60):
            while await llm.probe() is not state:
                await asyncio.sleep(0.01)

    async def test() -> None:
        async with started(checkpoint) as llm:
            pid = llm._client.pid
            assert pid is not None
            assert await llm.probe()
            monkeypatch.setattr(async_llm, "_SILENCE_LIMIT_S", 0.05)
            os.kill(pid, signal.SIGSTOP)
            await wait_for(llm, False)
            os.kill(pid, signal.SIGCONT)
            await wait_for(llm, True)

    run(test)


def test_an_engine_that_cannot_start_says_why(checkpoint: Path, tmp_path: Path) -> None:
    async def test() -> None:
        codec = str(checkpoint / "codec")
        config = EngineConfig.from_options(
            model=str(tmp_path), audio_tokenizer_type=codec, device="cpu"
        )
        llm = AsyncLLM(config, lambda info: NoVoice())
        with pytest.raises((ConfigError, CheckpointError), match=r"config\.json"):
            await llm.start()
        assert llm.is_dead
        await llm.shutdown()

    run(test)


def test_an_abort_before_the_engine_hears_of_the_request(checkpoint: Path) -> None:
    async def test() -> None:
        async with started(checkpoint) as llm:
            reader = asyncio.create_task(collect(llm, "early", SamplingParams(max_tokens=400)))
            await asyncio.sleep(0)  # its text is being prepared on a thread
            await llm.abort("early")
            with pytest.raises(RequestAbortedError):
                await reader
            assert (await collect(llm, "early", SamplingParams(max_tokens=20)))[-1].finished

    run(test)


def test_a_wrong_path_names_its_flag(checkpoint: Path) -> None:
    async def test() -> None:
        config = EngineConfig.from_options(
            model=str(checkpoint / "lm"), audio_tokenizer_type="/nowhere", device="cpu"
        )
        llm = AsyncLLM(config, lambda info: NoVoice())
        with pytest.raises((ConfigError, CheckpointError), match="--audio-tokenizer-type"):
            await llm.start()
        await llm.shutdown()

    run(test)


def test_a_model_of_another_family_is_refused_before_its_codec_is_looked_for(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        config = EngineConfig.from_options(
            model=str(tmp_path), audio_tokenizer_type="/nowhere", device="cpu"
        )
        llm = AsyncLLM(config, lambda info: NoVoice())
        with pytest.raises(ConfigError, match=r"LlamaForCausalLM.* is not supported"):
            await llm.start()
        await llm.shutdown()

    run(test)
