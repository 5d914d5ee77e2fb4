"""Voices that are prefilled at start: which, in which order, and what is left out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from vllm.entrypoints.bosonai.engine_host import EngineHost, HostState
from vllm.entrypoints.bosonai.voice_prefill import prefill_pinned
from vllm.exceptions import EngineError, VoiceStoreError

BLOCK = 16
NUM_POSITIONS = {"en_woman": 100, "en_man": 90, "de_man": 31}  # 6, 5 and 1 blocks


class FakeProcessor:
    """Knows how long the prompt of each voice is."""

    def prompts_of(self, prompt: Any) -> list[Any]:
        return [SimpleNamespace(num_voice_positions=NUM_POSITIONS[prompt.voice.voice_id])]


def prefilled(engine: Any, names: Sequence[str], max_blocks: int = 16) -> list[str]:
    """Ids of the voices that the engine was asked to speak in."""

    async def scenario() -> None:
        await engine.start()
        engine.info = replace(engine.info, max_pinned_blocks=max_blocks)
        engine.processor = FakeProcessor()
        await prefill_pinned(engine, names, block_size=BLOCK)

    asyncio.run(scenario())
    assert all(params.max_tokens == 2 for _, params, _ in engine.seen)
    return [prompt.voice.voice_id for prompt, _, _ in engine.seen]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), []),
        (("all",), ["en_woman", "en_man", "de_man"]),
        (("de_man", "en_man"), ["de_man", "en_man"]),
        (("onyx", "en_man", "onyx"), ["en_man"]),
    ],
)
def test_each_voice_is_prefilled_once(fake_engine: Any, names: Any, expected: list[str]) -> None:
    assert prefilled(fake_engine(), names) == expected


@pytest.mark.parametrize(
    ("max_blocks", "expected"),
    [
        (12, ["en_woman", "en_man", "de_man"]),
        (11, ["en_woman", "en_man"]),
        (10, ["en_woman", "de_man"]),
        (0, []),
    ],
)
def test_as_many_are_prefilled_as_can_be_pinned_together(
    fake_engine: Any, max_blocks: int, expected: list[str]
) -> None:
    assert prefilled(fake_engine(), ("all",), max_blocks) == expected


def test_the_log_says_what_did_not_fit(fake_engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        prefilled(fake_engine(), ("all",), 10)
    assert "en_man needs 5 blocks of 16 positions, but 6 of 10 that may be pinned" in caplog.text
    assert "prompts of 2 voices take 7 of 10 blocks that may be pinned" in caplog.text


def test_a_voice_that_is_gone_holds_up_no_other(
    fake_engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert prefilled(fake_engine(), ("anna", "de_man")) == ["de_man"]
    assert "--pinned-voices: anna could not be prepared: voice 'anna' is unknown" in caplog.text


def test_a_voice_that_fails_takes_no_room(
    fake_engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = fake_engine(fail_before=EngineError("the clip cannot be encoded"))
    assert prefilled(engine, ("all",), 6) == ["en_woman", "en_man", "de_man"]
    assert caplog.text.count("could not be prepared: the clip cannot be encoded") == 3


def test_presets_are_prefilled_while_the_store_fails(
    fake_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fake_engine()

    def fail(_: Any) -> list[str]:
        raise VoiceStoreError("no answer")

    asyncio.run(engine.start())
    monkeypatch.setattr(type(engine.voices), "names", property(fail))
    assert prefilled(engine, ("all",)) == ["en_woman", "en_man", "de_man"]


def test_a_server_is_ready_once_its_voices_are(fake_engine: Any) -> None:
    engines = [fake_engine(), fake_engine()]
    waiting, go_on, states = iter(engines), asyncio.Event(), []

    async def prepare(engine: Any) -> None:
        states.append((engine, host.state))
        await go_on.wait()

    host = EngineHost(lambda: next(waiting), restart=True, prepare=prepare)

    async def scenario() -> None:
        running = asyncio.create_task(host.run())
        for number, engine in enumerate(engines):
            while len(states) == number:
                await asyncio.sleep(0.005)
            assert host.state is HostState.LOADING
            go_on.set()
            while host.state is not HostState.READY:
                await asyncio.sleep(0.005)
            go_on.clear()
            engine.kill()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scenario())
    assert states == [(engine, HostState.LOADING) for engine in engines]
