"""Sends speech requests over HTTP and times what comes back; needs httpx.

Speaks OpenAI's speech route and the proxy's ``/generate``. Knows nothing of load and figures.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from vllm.audio import decode_clip
from vllm.benchmarks.figures import Result
from vllm.exceptions import InvalidRequestError

__all__ = ["ENDPOINTS", "TEXTS", "Client", "Settings", "make_bodies"]

ENDPOINTS = {"speech": "/v1/audio/speech", "generate": "/generate"}
TEXTS = (
    "Good morning.",
    "The train to the coast leaves from platform four in ten minutes.",
    "Please leave a message after the tone, and we will call you back as soon as we can.",
    "Nobody had expected the river to rise so quickly, yet by noon the lower meadows were under "
    "water and the farmers were moving their sheep.",
)

_PCM_RATE_HZ = 24_000  # OpenAI's; servers with another one say so in X-Sample-Rate
_PCM_SAMPLE_BYTES = 2
_ANY_RATE_HZ = 24_000  # files are decoded to this rate to learn their length
_MAX_CLIP_SECONDS = 3_600.0
_MAX_CLIP_BYTES = 2**30
_WAV_HEADER_LIMIT = 4096
_MAX_DETAIL_CHARS = 200


@dataclass(frozen=True)
class Settings:
    """What is sent, and where to."""

    base_url: str
    endpoint: Literal["speech", "generate"] = "speech"
    response_format: str = "pcm"  # of the speech route; /generate always makes a WAV
    voice: str | None = None
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    texts: Sequence[str] = TEXTS  # taken in turn
    max_tokens: tuple[int, int] | None = None  # frames of one request, drawn uniformly
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields of every body
    timeout_s: float = 120.0
    seed: int | None = None  # None sends no seed, which strict servers do not know

    @property
    def audio_format(self) -> str:
        return "wav" if self.endpoint == "generate" else self.response_format


class _RefusedError(Exception):
    """The server answered, but not with audio."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class _Received:
    pieces: list[tuple[float, bytes]]  # (seconds since sending, bytes)
    sample_rate: int


class Client:
    """One connection pool to one server."""

    def __init__(self, settings: Settings, transport: httpx.AsyncBaseTransport | None = None):
        self._settings = settings
        headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        self._http = httpx.AsyncClient(
            base_url=settings.base_url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            timeout=settings.timeout_s,
            limits=httpx.Limits(max_connections=None),
            transport=transport,
            trust_env=False,
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def check(self) -> None:
        """Raise httpx.HTTPError when there is no server or it is not ready.

        Peers need not have ``/health``: any answer but a server error will do.
        """
        reply = await self._http.get("/health")
        if reply.is_server_error:
            reply.raise_for_status()

    async def speak(self, body: Mapping[str, Any]) -> Result:
        """One request; whatever goes wrong is noted in the result."""
        failure, detail = "", ""
        received = None
        started_at = time.perf_counter()
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                received = await self._receive(body, started_at)
        except _RefusedError as error:
            failure, detail = error.kind, error.detail
        except (httpx.HTTPError, TimeoutError) as error:
            failure, detail = type(error).__name__, str(error)
        finished_s = time.perf_counter() - started_at
        if received is None:
            return Result(finished_s=finished_s, failure=failure, failure_detail=detail)
        try:
            arrivals = await asyncio.to_thread(
                _arrivals, received.pieces, self._settings.audio_format, received.sample_rate
            )
        except InvalidRequestError as error:
            return Result(finished_s=finished_s, failure="not audio", failure_detail=str(error))
        return Result(arrivals, finished_s)

    async def _receive(self, body: Mapping[str, Any], started_at: float) -> _Received:
        path = ENDPOINTS[self._settings.endpoint]
        pieces: list[tuple[float, bytes]] = []
        async with self._http.stream("POST", path, json=body) as reply:
            if reply.status_code != httpx.codes.OK:
                await reply.aread()
                raise _RefusedError(f"status {reply.status_code}", _message(reply))
            async for chunk in reply.aiter_bytes():
                pieces.append((time.perf_counter() - started_at, chunk))
        if not pieces:
            raise _RefusedError("no audio")
        return _Received(pieces, int(reply.headers.get("X-Sample-Rate", _PCM_RATE_HZ)))


def make_bodies(settings: Settings, count: int) -> list[dict[str, Any]]:
    """Request bodies, the same ones for the same seed."""
    rng = random.Random(settings.seed)
    bodies = []
    for index in range(count):
        text = settings.texts[index % len(settings.texts)]
        body: dict[str, Any] = {"text": text}
        if settings.endpoint == "speech":
            body = {"input": text, "response_format": settings.response_format}
        if settings.seed is not None:
            body["seed"] = rng.randrange(2**32)
        if settings.voice is not None:
            body["voice"] = settings.voice
        if settings.model is not None:
            body["model"] = settings.model
        if settings.max_tokens is not None:
            body["max_tokens"] = rng.randint(*settings.max_tokens)
        bodies.append({**body, **settings.extra})
    return bodies


def _message(reply: httpx.Response) -> str:
    """What an error body says, in OpenAI's shape or another."""
    try:
        content = reply.json()
    except ValueError:
        return reply.text[:_MAX_DETAIL_CHARS]
    error = content.get("error", content) if isinstance(content, dict) else content
    message = error.get("message", error) if isinstance(error, dict) else error
    text = message if isinstance(message, str) else json.dumps(message)
    return text[:_MAX_DETAIL_CHARS]


def _arrivals(
    pieces: Sequence[tuple[float, bytes]], audio_format: str, sample_rate: int
) -> tuple[tuple[float, float], ...]:
    """Seconds of audio in each piece: exact for pcm and wav, else its share of the file's bytes.

    Raises:
        InvalidRequestError: a file that cannot be decoded.
    """
    if audio_format == "pcm":
        bytes_per_s = float(sample_rate * _PCM_SAMPLE_BYTES)
        return tuple((at, len(piece) / bytes_per_s) for at, piece in pieces)
    data = b"".join(piece for _, piece in pieces)
    header = data.find(b"data", 0, _WAV_HEADER_LIMIT) + 8 if audio_format == "wav" else 0
    samples = decode_clip(
        data, sample_rate=_ANY_RATE_HZ, max_seconds=_MAX_CLIP_SECONDS, max_bytes=_MAX_CLIP_BYTES
    )
    s_per_byte = len(samples) / _ANY_RATE_HZ / max(1, len(data) - header)
    arrivals = []
    for at, piece in pieces:
        num_skipped = min(header, len(piece))
        header -= num_skipped
        if len(piece) > num_skipped:
            arrivals.append((at, (len(piece) - num_skipped) * s_per_byte))
    return tuple(arrivals)
