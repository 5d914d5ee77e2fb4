"""Streams of ``AsyncLLM`` in front of an engine that says what the test wants, when it wants."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from vllm.config import EngineConfig
from vllm.exceptions import EngineDeadError, EngineError
from vllm.outputs import FinishReason, SpeechOutput
from vllm.prompts import BuiltPrompt, SpeechPrompt, SpokenTurn
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import async_llm
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.messages import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineInfo,
)
from vllm.v1.engine.speech_task import Guards, Part, SpeechTask

INFO = EngineInfo(
    architecture="fake",
    num_codebooks=2,
    sample_rate=1000,
    hop_length=100,
    can_encode=True,
    codec_fingerprint="",
    max_model_len=512,
    max_num_seqs=4,
    num_kv_blocks=64,
    max_pinned_blocks=16,
    device="cpu",
    dtype="float32",
    tokenizer_folder="",
    model_folder="",
)
FAILURE = EngineCoreOutputs(failure="out of luck")


class ScriptedClient:
    """An engine process without a process: it hears everything and says what it is told to."""

    def __init__(self, _config: EngineConfig) -> None:
        self.added: asyncio.Queue[EngineCoreRequest] = asyncio.Queue()
        self.aborted: list[tuple[str, FinishReason]] = []
        self.has_ended = asyncio.Event()
        self._said: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()

    def say(self, *outputs: EngineCoreOutput) -> None:
        self._said.put_nowait(EngineCoreOutputs(outputs))

    def fail(self) -> None:
        self._said.put_nowait(FAILURE)

    def babble(self) -> None:
        self._said.put_nowait(ValueError("this is no message"))

    async def start(self) -> EngineInfo:
        return INFO

    async def add_request(self, request: EngineCoreRequest) -> None:
        self.added.put_nowait(request)

    async def abort_requests(self, request_ids: tuple[str, ...], reason: FinishReason) -> None:
        self.aborted += [(request_id, reason) for request_id in request_ids]

    async def get_outputs(self) -> EngineCoreOutputs:
        said = await self._said.get()
        if isinstance(said, Exception):
            raise said
        return said

    async def wait_dead(self) -> None:
        await self.has_ended.wait()

    async def shutdown(self) -> None:
        self.has_ended.set()


class ScriptedProcessor:
    """Makes a task of the parts that the test names, once the test allows it."""

    def __init__(self, *_: Any) -> None:
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.has_begun = threading.Event()

    def process(
        self, request_id: str, prompt: SpeechPrompt, params: SamplingParams, **_: Any
    ) -> SpeechTask:
        self.has_begun.set()
        assert self.may_go_on.wait(60)
        parts = [Part(text, _builder(text)) for text in (prompt.text or "").split("|")]
        return SpeechTask(
            request_id,
            parts,
            params,
            seed=0,
            guards=Guards(),
            keeps_voice=False,
            info=INFO,
            arrival_time=0.0,
        )


def _builder(text: str) -> Callable[[Sequence[SpokenTurn]], BuiltPrompt]:
    def build(_history: Sequence[SpokenTurn]) -> BuiltPrompt:
        if text == "broken":
            raise ValueError("nobody expected this")
        return BuiltPrompt(np.zeros(4, np.int32), (), ())

    return build


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Makes an ``AsyncLLM`` with both stand-ins, not yet started."""
    monkeypatch.setattr(async_llm, "IpcClient", ScriptedClient)
    monkeypatch.setattr(async_llm, "Processor", ScriptedProcessor)
    return lambda: AsyncLLM(EngineConfig(), lambda _info: None)


async def collect(
    llm: Any, request_id: str, text: str, timeout_s: float | None = None
) -> list[SpeechOutput]:
    prompt, params = SpeechPrompt(text=text), SamplingParams()
    source = llm.generate(prompt, params, request_id, timeout_s=timeout_s)
    return [item async for item in source]


def run(test: Callable[[], Any]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await test()

    asyncio.run(bounded())


def test_a_request_that_was_prepared_while_the_engine_died_is_told(
    scripted: Callable[[], Any],
) -> None:
    async def test() -> None:
        llm = scripted()
        await llm.start()
        processor = llm.processor
        processor.may_go_on.clear()
        reader = asyncio.create_task(collect(llm, "late", "Hello."))
        while not processor.has_begun.is_set():
            await asyncio.sleep(0.001)
        llm._client.fail()
        while not llm.is_dead:
            await asyncio.sleep(0.001)
        processor.may_go_on.set()
        with pytest.raises(EngineDeadError, match="out of luck"):
            await reader
        assert llm._client.added.empty()
        await llm.shutdown()

    run(test)


def test_an_engine_that_cannot_be_understood_is_ended(scripted: Callable[[], Any]) -> None:
    async def test() -> None:
        llm = scripted()
        await llm.start()
        reader = asyncio.create_task(collect(llm, "open", "Hello."))
        await llm._client.added.get()
        llm._client.babble()
        with pytest.raises(EngineDeadError, match="this is no message"):
            await reader
        await llm.wait_dead()
        assert llm.is_dead

    run(test)


def test_a_later_part_that_cannot_be_made_ends_its_own_request_alone(
    scripted: Callable[[], Any],
) -> None:
    async def test() -> None:
        llm = scripted()
        await llm.start()
        bad = asyncio.create_task(collect(llm, "bad", "good|broken"))
        bad_part = await llm._client.added.get()
        good = asyncio.create_task(collect(llm, "good", "good|good"))
        good_part = await llm._client.added.get()
        stop = FinishReason.STOP
        llm._client.say(
            EngineCoreOutput(bad_part.request_id, finish_reason=stop),
            EngineCoreOutput(good_part.request_id, finish_reason=stop),
        )
        with pytest.raises(EngineError, match="nobody expected this"):
            await bad
        last_part = await llm._client.added.get()
        llm._client.say(EngineCoreOutput(last_part.request_id, finish_reason=stop))
        assert (await good)[-1].finish_reason is stop
        await llm.shutdown()

    run(test)


def test_a_name_may_be_used_again_while_the_engine_still_speaks_of_its_last_owner(
    scripted: Callable[[], Any],
) -> None:
    async def test() -> None:
        llm = scripted()
        await llm.start()
        left = asyncio.create_task(collect(llm, "name", "good"))
        old = await llm._client.added.get()
        left.cancel()
        await asyncio.wait({left})
        assert llm._client.aborted == [(old.request_id, FinishReason.ABORT)]
        reader = asyncio.create_task(collect(llm, "name", "good"))
        new = await llm._client.added.get()
        llm._client.say(
            EngineCoreOutput(old.request_id, finish_reason=FinishReason.ABORT),
            EngineCoreOutput(new.request_id, finish_reason=FinishReason.STOP),
        )
        assert [item.finish_reason for item in await reader] == [FinishReason.STOP]
        await llm.shutdown()

    run(test)


def test_no_name_is_that_of_another_requests_part(scripted: Callable[[], Any]) -> None:
    async def test() -> None:
        llm = scripted()
        await llm.start()
        readers, ids = [], []
        for name in ("a", "a#1", "a#1.0"):
            readers.append(asyncio.create_task(collect(llm, name, "good|good")))
            ids.append((await llm._client.added.get()).request_id)
        stop = FinishReason.STOP
        llm._client.say(*(EngineCoreOutput(each, finish_reason=stop) for each in ids))
        later = [(await llm._client.added.get()).request_id for _ in readers]
        assert len({*ids, *later}) == 6
        llm._client.say(*(EngineCoreOutput(each, finish_reason=stop) for each in later))
        names = [(await reader)[-1].request_id for reader in readers]
        assert names == ["a", "a#1", "a#1.0"]
        await llm.shutdown()

    run(test)


def test_a_time_limit_counts_from_the_call_and_not_from_when_it_was_prepared(
    scripted: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        deadlines: list[float] = []
        call_at = loop.call_at

        def watched(when: float, *args: Any, **options: Any) -> asyncio.TimerHandle:
            deadlines.append(when)
            return call_at(when, *args, **options)

        llm = scripted()
        await llm.start()
        processor = llm.processor
        processor.may_go_on.clear()
        limit_s = 3600.0  # longer than any other timer of the test
        reader = asyncio.create_task(collect(llm, "slow", "Hello.", timeout_s=limit_s))
        while not processor.has_begun.is_set():
            await asyncio.sleep(0.001)
        called_before = loop.time()
        monkeypatch.setattr(loop, "call_at", watched)
        processor.may_go_on.set()
        part = await llm._client.added.get()
        llm._client.say(EngineCoreOutput(part.request_id, finish_reason=FinishReason.STOP))
        await reader
        assert max(deadlines) < called_before + limit_s
        await llm.shutdown()

    run(test)
