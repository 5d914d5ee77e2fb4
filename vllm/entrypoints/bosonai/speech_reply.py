"""How audio leaves the server: encoded as a stream, as server-sent events, or as one file.

An error after the first byte breaks the reply off and never becomes bytes of audio. Knows nothing
of request bodies and routes.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import string
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm.audio import AudioFormat, TimeStretch, make_encoder
from vllm.entrypoints.bosonai.middleware import unless_client_leaves
from vllm.entrypoints.openai.errors import error_body, log_early_end
from vllm.exceptions import EngineError, HiggsAudioError
from vllm.outputs import FinishReason, SpeechOutput, SpeechStats, Usage

__all__ = [
    "END_HEADERS",
    "FALLBACK_HEADER",
    "START_HEADERS",
    "AudioFacts",
    "Ending",
    "Reply",
    "SpeechReply",
    "StreamedReply",
    "end_headers",
    "header_text",
    "summary",
]

# known before the first byte, so on every reply
START_HEADERS = ("X-Seed", "X-Voice", "X-Sample-Rate", "X-Channels", "X-Bit-Depth")
# the voice that was asked for, where another had to speak
FALLBACK_HEADER = "X-Voice-Fallback"
# known at the end, so on complete files only
END_HEADERS = (
    "X-Usage-Prompt-Tokens",
    "X-Usage-Completion-Tokens",
    "X-Usage-Audio-Tokens",
    "X-Usage-Total-Tokens",
    "X-Audio-Duration-Seconds",
    "X-Processing-Time-Seconds",
    "X-Realtime-Factor",
    "X-RTF",
    "X-Finish-Reason",
)
_HEADER_SAFE = "".join(set(string.punctuation) - {"%"})
_EVENT_BYTES = 48_000  # of audio; many clients read lines of up to 64 KiB, and base64 adds a third
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def header_text(text: str) -> str:
    """A text as a header can hold it: percent-encoded but for visible ASCII."""
    return quote(text, safe=_HEADER_SAFE)


class _AudioPipe:
    """Stretches and encodes one reply. Blocking; one call at a time, on any thread."""

    def __init__(
        self, audio_format: AudioFormat, sample_rate: int, speed: float, *, streaming: bool
    ) -> None:
        self._encoder = make_encoder(audio_format, sample_rate, streaming=streaming)
        self._stretch = None if speed == 1.0 else TimeStretch(sample_rate, speed)
        self._sample_rate = sample_rate
        self._num_samples = 0

    @property
    def duration_s(self) -> float:
        """Audio put in so far, after stretching."""
        return self._num_samples / self._sample_rate

    def push(self, samples: NDArray[np.float32]) -> bytes:
        return self._encode(samples if self._stretch is None else self._stretch.process(samples))

    def finish(self) -> bytes:
        rest = b"" if self._stretch is None else self._encode(self._stretch.finish())
        return rest + self._encoder.finish()

    def _encode(self, samples: NDArray[np.float32]) -> bytes:
        self._num_samples += samples.size
        return self._encoder.encode(samples) if samples.size else b""


@dataclass(frozen=True)
class Ending:
    """How a reply ended."""

    reason: FinishReason
    usage: Usage
    stats: SpeechStats
    seed: int


@dataclass(frozen=True)
class AudioFacts:
    """What is known of a reply before its first byte."""

    format: AudioFormat
    sample_rate: int
    voice_id: str
    seed: int


class Reply(ABC):
    """A reply as a stream, as events or as one file; subclasses say where its bytes come from.

    Args:
        facts: for the headers.
        outputs: what the bytes are made of; to be closed when the reply is given up.
        extra_headers: go beside those of the audio.
    """

    def __init__(
        self,
        facts: AudioFacts,
        outputs: AsyncGenerator[SpeechOutput],
        extra_headers: Mapping[str, str],
    ) -> None:
        self.facts = facts
        self.outputs = outputs
        self.extra_headers = dict(extra_headers)

    @property
    def format(self) -> AudioFormat:
        return self.facts.format

    def headers(self) -> dict[str, str]:
        """Headers known before the first byte."""
        return {
            **_STREAM_HEADERS,
            **self.extra_headers,
            "X-Seed": str(self.facts.seed),
            "X-Voice": header_text(self.facts.voice_id),
            "X-Sample-Rate": str(self.facts.sample_rate),
            "X-Channels": "1",
            "X-Bit-Depth": "16",
        }

    @abstractmethod
    def audio(self) -> AsyncGenerator[bytes]:
        """Pieces of one valid file, each as soon as it exists."""

    @abstractmethod
    def ending(self) -> Ending:
        """How it ended, once ``audio`` is; durations are those of the file, after stretching."""

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events: the pieces of ``audio``, then usage, or an error."""
        try:
            async with aclosing(self.audio()) as pieces:
                async for piece in pieces:
                    for start in range(0, len(piece), _EVENT_BYTES):
                        encoded = base64.b64encode(piece[start : start + _EVENT_BYTES])
                        audio = encoded.decode("ascii")
                        yield _event({"type": "speech.audio.delta", "audio": audio})
        except HiggsAudioError as error:
            log_early_end(error)
            body = error_body(error.http_status, str(error), code=error.code)
            yield _event({"type": "speech.audio.error", "error": body["error"]})
            return
        yield _event({"type": "speech.audio.done", **summary(self.ending())})

    async def data(self) -> bytes:
        """The bytes of the complete file; ``ending`` tells the rest."""
        async with aclosing(self.outputs), aclosing(self.audio()) as pieces:
            return b"".join([piece async for piece in pieces])

    async def file(self) -> Response:
        """The complete file, with its true length, usage and timings."""
        data = await self.data()
        headers = {**self.headers(), **end_headers(self.ending())}
        return Response(data, media_type=self.format.media_type, headers=headers)


class SpeechReply(Reply):
    """One reply under way: its first output is there, the others follow.

    Args:
        first: the first output with audio.
        outputs: the others.
        pool: threads that encode and stretch.
        audio_format: of the bytes.
        voice_id: for the header.
        speed: 0.25 to 4, pitch kept.
        streaming: bytes leave as they come; else the container states its true length.
        extra_headers: go beside those of the audio.
    """

    def __init__(
        self,
        first: SpeechOutput,
        outputs: AsyncGenerator[SpeechOutput],
        pool: ThreadPoolExecutor,
        *,
        audio_format: AudioFormat,
        voice_id: str,
        speed: float = 1.0,
        streaming: bool,
        extra_headers: Mapping[str, str] | None = None,
    ) -> None:
        facts = AudioFacts(audio_format, first.sample_rate, voice_id, first.seed)
        super().__init__(facts, outputs, extra_headers or {})
        self._first = first
        self._pool = pool
        self._pipe = _AudioPipe(audio_format, first.sample_rate, speed, streaming=streaming)
        self._ending: Ending | None = None

    async def audio(self) -> AsyncGenerator[bytes]:
        async with aclosing(self._all_outputs()) as outputs:
            async for output in outputs:
                piece = await self._run(self._pipe.push, output.audio)
                if piece:
                    yield piece
                if output.finish_reason is not None:
                    self._end(output, output.finish_reason)
        if self._ending is None:
            raise EngineError("the engine stopped before the audio was complete")
        tail = await self._run(self._pipe.finish)
        if tail:
            yield tail

    async def _all_outputs(self) -> AsyncGenerator[SpeechOutput]:
        yield self._first
        async for output in self.outputs:  # closed by whoever gives the reply up
            yield output

    async def _run(self, function: Any, *args: Any) -> bytes:
        loop = asyncio.get_running_loop()
        data: bytes = await loop.run_in_executor(self._pool, function, *args)
        return data

    def _end(self, last: SpeechOutput, reason: FinishReason) -> None:
        self._ending = Ending(reason, last.usage, last.stats, last.seed)

    def ending(self) -> Ending:
        assert self._ending is not None, "the audio is complete"
        stats = dataclasses.replace(self._ending.stats, audio_duration_s=self._pipe.duration_s)
        return dataclasses.replace(self._ending, stats=stats)


class StreamedReply(Response):
    """Sends pieces as they come and ends the request when the client leaves."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes],
        outputs: AsyncGenerator[SpeechOutput],
        media_type: str,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(media_type=media_type, headers=headers)
        del self.headers["content-length"]
        self._pieces = pieces
        self._outputs = outputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._outputs):
            await unless_client_leaves(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        async with aclosing(self._pieces):
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(payload: Mapping[str, Any]) -> bytes:
    text = json.dumps(payload, separators=(",", ":"))
    return f"event: {payload['type']}\ndata: {text}\n\n".encode()


def summary(ending: Ending) -> dict[str, Any]:
    """Usage, timings, reason and seed, as JSON replies tell them."""
    usage, stats = ending.usage, ending.stats
    return {
        "usage": {
            "input_tokens": usage.prompt_tokens,
            "output_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "audio_tokens": usage.audio_tokens,
        },
        "stats": {
            "audio_duration_seconds": round(stats.audio_duration_s, 4),
            "processing_time_seconds": round(stats.processing_time_s, 4),
            "realtime_factor": round(stats.realtime_factor, 4),
            "rtf": round(stats.rtf, 4),
            "time_to_first_audio_seconds": _rounded(stats.time_to_first_audio_s),
        },
        "finish_reason": ending.reason.value,
        "seed": ending.seed,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def end_headers(ending: Ending) -> dict[str, str]:
    """Headers of a complete reply."""
    usage, stats = ending.usage, ending.stats
    values = (
        str(usage.prompt_tokens),
        str(usage.completion_tokens),
        str(usage.audio_tokens),
        str(usage.total_tokens),
        f"{stats.audio_duration_s:.4f}",
        f"{stats.processing_time_s:.4f}",
        f"{stats.realtime_factor:.4f}",
        f"{stats.rtf:.4f}",
        ending.reason.value,
    )
    return dict(zip(END_HEADERS, values, strict=True))
