"""Keys of replies, and what the cache keeps of them: bytes, order, bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vllm.audio import lookup
from vllm.entrypoints.bosonai.response_cache import ReplyKeys, ResponseCache
from vllm.entrypoints.bosonai.speech_reply import AudioFacts, Ending, Reply
from vllm.outputs import FinishReason, SpeechOutput, SpeechStats, Usage
from vllm.prompts import PromptClip, SpeechPrompt, Voice
from vllm.sampling_params import SamplingParams

SEEDED = SamplingParams(seed=1)
VOICE = Voice(
    "anna", "Anna", transcript="Words.", clip=PromptClip(2, samples=np.ones(1920, np.float32))
)
PROMPT = SpeechPrompt(text="Hello.", voice=VOICE)


def clip(value: float) -> PromptClip:
    return PromptClip(2, samples=np.full(1920, value, np.float32))


def test_equal_requests_have_one_key() -> None:
    keys = ReplyKeys()
    key = keys.key_of(PROMPT, SEEDED, "mp3", 1.0)
    same_voice = replace(VOICE, clip=clip(1.0))
    assert keys.key_of(SpeechPrompt(text="Hello.", voice=same_voice), SEEDED, "mp3", 1.0) == key
    assert ReplyKeys().key_of(PROMPT, SamplingParams(seed=1, top_k=50), "mp3", 1.0) == key


@pytest.mark.parametrize(
    ("prompt", "params", "circumstances"),
    [
        ({"text": "Hello!"}, {}, ("mp3", 1.0)),
        ({"language": "de"}, {}, ("mp3", 1.0)),
        ({"instructions": "Slow."}, {}, ("mp3", 1.0)),
        ({"system_prompt": "Slow."}, {}, ("mp3", 1.0)),
        ({"normalize": False}, {}, ("mp3", 1.0)),
        ({"voice": replace(VOICE, clip=clip(0.5))}, {}, ("mp3", 1.0)),
        ({"voice": replace(VOICE, transcript="Other.")}, {}, ("mp3", 1.0)),
        ({"voice": replace(VOICE, scene="A cave.")}, {}, ("mp3", 1.0)),
        ({"ref_audio": np.ones(960, np.float32), "ref_text": "a"}, {}, ("mp3", 1.0)),
        ({"text": "[SPEAKER0] a", "voices": {"SPEAKER0": VOICE}}, {}, ("mp3", 1.0)),
        ({}, {"seed": 2}, ("mp3", 1.0)),
        ({}, {"temperature": 0.5}, ("mp3", 1.0)),
        ({}, {"max_tokens": 9}, ("mp3", 1.0)),
        ({}, {"ras_mode": "block"}, ("mp3", 1.0)),
        ({}, {}, ("wav", 1.0)),
        ({}, {}, ("mp3", 1.5)),
        ({}, {}, ("mp3", 1.0, "owner")),
    ],
)
def test_what_changes_an_answer_changes_its_key(
    prompt: dict[str, Any], params: dict[str, Any], circumstances: tuple[Any, ...]
) -> None:
    keys = ReplyKeys()
    key = keys.key_of(PROMPT, SEEDED, "mp3", 1.0)
    other = keys.key_of(replace(PROMPT, **prompt), replace(SEEDED, **params), *circumstances)
    assert other is not None
    assert other != key


def test_voices_of_speakers_are_part_of_the_key() -> None:
    keys = ReplyKeys()
    other = replace(VOICE, clip=clip(0.5))
    prompts = [
        SpeechPrompt(text="[SPEAKER0] a [SPEAKER1] b", voices={"SPEAKER0": x, "SPEAKER1": y})
        for x, y in ((VOICE, other), (other, VOICE), (VOICE, VOICE))
    ]
    assert len({keys.key_of(prompt, SEEDED) for prompt in prompts}) == 3


def test_only_requests_that_repeat_have_keys() -> None:
    keys = ReplyKeys()
    assert keys.key_of(PROMPT, SamplingParams()) is None
    greedy = keys.key_of(PROMPT, SamplingParams(temperature=0))
    assert greedy == keys.key_of(PROMPT, SamplingParams(temperature=0, seed=0))


class Made(Reply):
    """A reply of given pieces."""

    def __init__(self, *pieces: bytes, reason: FinishReason = FinishReason.STOP) -> None:
        super().__init__(AudioFacts(lookup("pcm"), 24_000, "anna", 1), self._nothing(), {})
        self._pieces = pieces
        self._reason = reason

    async def _nothing(self) -> AsyncGenerator[SpeechOutput]:
        return
        yield

    async def audio(self) -> AsyncGenerator[bytes]:
        for piece in self._pieces:
            yield piece

    def ending(self) -> Ending:
        stats = SpeechStats(audio_duration_s=2.0, processing_time_s=9.0, queue_time_s=5.0)
        return Ending(self._reason, Usage(3, 4, 5), stats, 1)


def make(cache: ResponseCache, key: bytes, *pieces: bytes, **options: Any) -> bytes:
    return asyncio.run(cache.recorded(key, Made(*pieces, **options)).data())


def test_a_kept_reply_is_the_one_that_was_made() -> None:
    now = [100.0]
    cache = ResponseCache(2**20, clock=lambda: now[0])
    assert cache.find(b"k") is None
    assert make(cache, b"k", b"ab", b"cd") == b"abcd"
    now[0] += 7.9
    kept = cache.find(b"k")
    assert kept is not None
    assert asyncio.run(kept.data()) == b"abcd"
    assert kept.headers()["X-Cache"] == "hit"
    assert kept.headers()["Age"] == "7"
    assert kept.headers()["X-Voice"] == "anna"
    ending = kept.ending()
    assert (ending.usage, ending.reason) == (Usage(3, 4, 5), FinishReason.STOP)
    assert ending.stats.audio_duration_s == 2.0
    assert ending.stats.processing_time_s < 5
    assert ending.stats.queue_time_s == 0
    stats = cache.stats()
    assert (stats.num_queries, stats.num_hits, stats.num_replies) == (2, 1, 1)


@pytest.mark.parametrize(
    ("reason", "is_kept"),
    [
        (FinishReason.STOP, True),
        (FinishReason.LENGTH, True),
        (FinishReason.SILENCE, True),
        (FinishReason.DEADLINE, False),
        (FinishReason.ABORT, False),
        (FinishReason.ERROR, False),
    ],
)
def test_only_an_ending_that_repeats_is_kept(reason: FinishReason, is_kept: bool) -> None:
    cache = ResponseCache(2**20)
    make(cache, b"k", b"ab", reason=reason)
    assert (cache.find(b"k") is not None) is is_kept


def test_a_reply_that_was_left_is_not_kept() -> None:
    cache = ResponseCache(2**20)

    async def leave() -> None:
        pieces = cache.recorded(b"k", Made(b"ab", b"cd")).audio()
        assert await anext(pieces) == b"ab"
        assert cache.stats().num_bytes > 0
        await pieces.aclose()

    asyncio.run(leave())
    assert cache.find(b"k") is None
    assert cache.stats().num_bytes == 0


def test_the_least_recently_used_goes_first_and_bytes_are_bounded() -> None:
    size = 400_000
    cache = ResponseCache(size)
    piece = bytes(60_000)
    for key in (b"a", b"b", b"c", b"d"):
        make(cache, key, piece)
    assert cache.find(b"a") is not None
    make(cache, b"e", piece)
    kept = [key for key in (b"a", b"b", b"c", b"d", b"e") if cache.find(key) is not None]
    assert kept == [b"a", b"c", b"d", b"e"]
    assert 240_000 < cache.stats().num_bytes <= size


def test_an_equal_reply_takes_the_place_of_the_first() -> None:
    cache = ResponseCache(400_000)
    make(cache, b"a", bytes(50_000))
    first = cache.stats()
    make(cache, b"a", bytes(50_000))
    assert cache.stats().num_bytes == first.num_bytes
    assert cache.stats().num_replies == 1


def test_a_reply_too_large_to_keep_passes_and_drops_no_other() -> None:
    cache = ResponseCache(400_000)
    make(cache, b"a", bytes(50_000))
    held = cache.stats().num_bytes
    large = [bytes(30_000)] * 20
    assert make(cache, b"big", *large) == bytes(600_000)
    assert cache.find(b"big") is None
    assert cache.find(b"a") is not None
    assert cache.stats().num_bytes == held


def test_replies_under_way_share_their_room() -> None:
    cache = ResponseCache(400_000)

    async def both() -> None:
        first, second = (
            cache.recorded(key, Made(bytes(60_000), bytes(10_000))).audio() for key in (b"a", b"b")
        )
        await anext(first)
        await anext(second)  # finds 40 kB left and gives up
        for pieces in (first, second):
            assert len([piece async for piece in pieces]) == 1

    asyncio.run(both())
    assert cache.find(b"a") is not None
    assert cache.find(b"b") is None
