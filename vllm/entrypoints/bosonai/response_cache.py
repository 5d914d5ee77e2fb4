"""Finished replies of seeded requests, kept in memory so that frequent phrases are made once.

Bounded in bytes. A reply is kept when its last byte was made, and never a cut or failed one; what
a request means to the engine decides which reply answers it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from vllm.entrypoints.bosonai.speech_reply import AudioFacts, Ending, Reply
from vllm.outputs import FinishReason, SpeechOutput
from vllm.prompts import SpeechPrompt, Voice
from vllm.sampling_params import SamplingParams
from vllm.v1.metrics import CacheStats

__all__ = ["CACHE_HEADERS", "KeptReply", "ReplyKeys", "ResponseCache"]

CACHE_HEADERS = ("X-Cache", "Age")

# Endings that the next equal request would have too.
_REPEATABLE = frozenset(
    {
        FinishReason.STOP,
        FinishReason.LENGTH,
        FinishReason.MAX_AUDIO,
        FinishReason.SILENCE,
        FinishReason.TEXT_LENGTH,
    }
)
_SHARE_UNDER_WAY = 0.25  # of the bytes, for replies that are not complete yet
_ENTRY_BYTES = 1024  # beside the audio: figures, key, and the places that hold them
_PIECE_BYTES = 64  # the object that holds a piece, and the place for it


class ReplyKeys:
    """Names replies by everything that makes them what they are, voices by their content."""

    def __init__(self) -> None:
        self._voices: WeakKeyDictionary[Voice, bytes] = WeakKeyDictionary()

    def key_of(
        self, prompt: SpeechPrompt, params: SamplingParams, *circumstances: Any
    ) -> bytes | None:
        """Key of a request; None when its answer is drawn anew each time.

        Args:
            prompt: with resolved voices.
            params: of the request, defaults filled in.
            circumstances: what else its bytes depend on, as plain values.
        """
        if params.seed is None:
            if params.temperature > 0:
                return None
            params = dataclasses.replace(params, seed=0)  # what the engine takes then
        hasher = hashlib.blake2b(digest_size=32)
        self._feed(hasher, (prompt, params, circumstances))
        return hasher.digest()

    def _feed(self, hasher: hashlib.blake2b, value: Any) -> None:
        """Add a value so that no other one adds the same bytes."""
        if isinstance(value, Voice):
            hasher.update(b"voice\0" + self._voice(value))
        elif isinstance(value, np.ndarray):
            hasher.update(f"array {value.dtype} {value.shape}\0".encode())
            hasher.update(np.ascontiguousarray(value).tobytes())
        elif dataclasses.is_dataclass(value):
            self._feed(hasher, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
        elif isinstance(value, Mapping):
            self._feed(hasher, sorted(value.items()))
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            hasher.update(f"list {len(value)}\0".encode())
            for item in value:
                self._feed(hasher, item)
        else:
            hasher.update(f"{value!r}\0".encode())  # a zero byte is escaped in it

    def _voice(self, voice: Voice) -> bytes:
        """Hash of a voice, clip included, which is worked out once for each that is loaded."""
        known = self._voices.get(voice)
        if known is None:
            hasher = hashlib.blake2b(digest_size=32)
            self._feed(hasher, [getattr(voice, f.name) for f in dataclasses.fields(voice)])
            known = self._voices[voice] = hasher.digest()
        return known


class _Kept(NamedTuple):
    facts: AudioFacts
    pieces: tuple[bytes, ...]
    ending: Ending
    made_at: float
    num_bytes: int


class ResponseCache:
    """Replies by their keys; the least recently used go first.

    Replies that are being made may take up a quarter of the bytes, complete ones the rest. A reply
    that grows beyond its part is not kept.

    Args:
        max_bytes: of all of them.
        clock: monotonic seconds.
    """

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_under_way = int(max_bytes * _SHARE_UNDER_WAY)
        self._max_kept = max_bytes - self._max_under_way
        self._clock = clock
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._num_kept_bytes = 0
        self._num_bytes_under_way = 0
        self._num_queries = 0
        self._num_hits = 0

    def find(self, key: bytes) -> KeptReply | None:
        """The reply of that key, if there is one, as a new reply."""
        self._num_queries += 1
        kept = self._kept.get(key)
        if kept is None:
            return None
        self._num_hits += 1
        self._kept.move_to_end(key)
        return KeptReply(kept, max(0.0, self._clock() - kept.made_at))

    def recorded(self, key: bytes, reply: Reply) -> Reply:
        """The same reply, which is kept once it is complete."""
        return _RecordedReply(reply, lambda: _Draft(self, key))

    def stats(self) -> CacheStats:
        """Figures since the start, and what is held now."""
        return CacheStats(
            num_queries=self._num_queries,
            num_hits=self._num_hits,
            num_replies=len(self._kept),
            num_bytes=self._num_kept_bytes + self._num_bytes_under_way,
        )

    def reserve(self, num_bytes: int) -> bool:
        """Count bytes of a reply under way; False, and nothing counted, when there is no room."""
        if self._num_bytes_under_way + num_bytes > self._max_under_way:
            return False
        self._num_bytes_under_way += num_bytes
        return True

    def release(self, num_bytes: int) -> None:
        """Forget bytes of a reply under way."""
        self._num_bytes_under_way -= num_bytes

    def keep(
        self, key: bytes, facts: AudioFacts, pieces: tuple[bytes, ...], ending: Ending, size: int
    ) -> None:
        """Keep a complete reply of ``size`` bytes; another one of its key is equal and goes."""
        self._drop(key)
        self._kept[key] = _Kept(facts, pieces, ending, self._clock(), size)
        self._num_kept_bytes += size
        while self._num_kept_bytes > self._max_kept:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: bytes) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._num_kept_bytes -= kept.num_bytes


class _Draft:
    """A reply that is being made; given up when it outgrows its room."""

    def __init__(self, cache: ResponseCache, key: bytes) -> None:
        self._cache = cache
        self._key = key
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self._is_open = True
        self._reserve(_ENTRY_BYTES)

    def add(self, piece: bytes) -> None:
        if self._is_open and self._reserve(len(piece) + _PIECE_BYTES):
            self._pieces.append(piece)

    def keep(self, facts: AudioFacts, ending: Ending) -> None:
        if self._is_open and ending.reason in _REPEATABLE:
            self._cache.keep(self._key, facts, tuple(self._pieces), ending, self._num_bytes)

    def close(self) -> None:
        """Give back the room; a reply that was kept has its own."""
        if self._is_open:
            self._is_open = False
            self._cache.release(self._num_bytes)
            self._pieces = []

    def _reserve(self, num_bytes: int) -> bool:
        if not self._cache.reserve(num_bytes):
            self.close()
            return False
        self._num_bytes += num_bytes
        return True


class _RecordedReply(Reply):
    """A reply that passes through to its client and into the cache."""

    def __init__(self, reply: Reply, make_draft: Callable[[], _Draft]) -> None:
        super().__init__(reply.facts, reply.outputs, reply.extra_headers)
        self._reply = reply
        self._make_draft = make_draft

    async def audio(self) -> AsyncGenerator[bytes]:
        draft = self._make_draft()
        try:
            async with aclosing(self._reply.audio()) as pieces:
                async for piece in pieces:
                    draft.add(piece)
                    yield piece
            draft.keep(self.facts, self.ending())
        finally:
            draft.close()

    def ending(self) -> Ending:
        return self._reply.ending()


class KeptReply(Reply):
    """A reply from the cache: the bytes and usage of the one that was made, in no time."""

    def __init__(self, kept: _Kept, age_s: float) -> None:
        headers = dict(zip(CACHE_HEADERS, ("hit", str(int(age_s))), strict=True))
        super().__init__(kept.facts, _no_outputs(), headers)
        self._kept = kept
        self._begun_at = time.monotonic()
        self._first_after_s: float | None = None

    async def audio(self) -> AsyncGenerator[bytes]:
        for piece in self._kept.pieces:
            if self._first_after_s is None:
                self._first_after_s = time.monotonic() - self._begun_at
            yield piece

    def ending(self) -> Ending:
        """As it was; the times are those of this reply."""
        stats = dataclasses.replace(
            self._kept.ending.stats,
            processing_time_s=time.monotonic() - self._begun_at,
            time_to_first_audio_s=self._first_after_s,
            queue_time_s=0.0,
            prefill_time_s=0.0,
            decode_time_s=0.0,
        )
        return dataclasses.replace(self._kept.ending, stats=stats)


async def _no_outputs() -> AsyncGenerator[SpeechOutput]:
    return
    yield  # makes it a generator
