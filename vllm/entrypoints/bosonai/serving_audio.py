"""The speech route: a checked body becomes a stream of encoded audio, SSE events or one file.

The status is decided after the first audio exists; an error after that breaks the reply off and
never becomes bytes of audio. Knows nothing of routes, keys or processes.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm.audio import AudioFormat, TimeStretch, lookup, make_encoder
from vllm.entrypoints.bosonai.engine_host import EngineClient, EngineHost
from vllm.entrypoints.bosonai.middleware import unless_client_leaves
from vllm.entrypoints.bosonai.reference_audio import ReferenceAudioLoader
from vllm.entrypoints.openai.errors import error_body
from vllm.entrypoints.openai.protocol import AudioSpeechRequest
from vllm.exceptions import (
    EngineError,
    HiggsAudioError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RequestAbortedError,
)
from vllm.logger import get_logger
from vllm.outputs import FinishReason, SpeechOutput, SpeechStats, Usage
from vllm.prompts import SpeechPrompt

if TYPE_CHECKING:
    from vllm.entrypoints.cli_args import ServeArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.messages import EngineInfo
    from vllm.v1.metrics import SpeechMetrics

__all__ = ["END_HEADERS", "START_HEADERS", "ServingAudio"]

logger = get_logger(__name__)

# known before the first byte, so on every reply
START_HEADERS = ("X-Seed", "X-Voice", "X-Sample-Rate", "X-Channels", "X-Bit-Depth")
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
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_CLONED_VOICE = "custom"  # as the engine calls it


class ServingAudio:
    """Answers ``POST /v1/audio/speech``.

    Args:
        args: model names, limits and defaults.
        host: of the engine.
        metrics: where requests are counted.
        pool: threads that encode and stretch.
        clips: reads the clips that requests bring along.
    """

    def __init__(
        self,
        args: ServeArgs,
        host: EngineHost,
        metrics: SpeechMetrics,
        pool: ThreadPoolExecutor,
        clips: ReferenceAudioLoader,
    ) -> None:
        self._config = args.server
        self._defaults = args.engine.defaults
        self._model_names = args.model_names
        self._host = host
        self._metrics = metrics
        self._pool = pool
        self._clips = clips
        self._num_waiting = 0

    async def create_speech(self, body: AudioSpeechRequest, raw: Request) -> Response:
        """The reply to one request.

        Raises:
            HiggsAudioError: the request is refused, or failed before its first audio.
        """
        request_id = f"audiospeech-{raw.state.request_id}-{secrets.token_hex(4)}"
        if body.unknown_fields:
            shown = ", ".join(body.unknown_fields)[:200]
            logger.warning("ignored fields: %r", shown, extra={"request_id": request_id})
        self._check_model(body.model)
        self._check_length(body.input)
        engine = self._host.ready_engine()
        info = engine.info
        assert info is not None, "a ready engine has its info"
        voice_id = await self._voice_id(body, engine)
        params = body.to_sampling_params(self._defaults)
        prompt = await unless_client_leaves(raw.receive, self._build_prompt(body, info))
        outputs = self._generate(engine, prompt, params, request_id)
        first = await unless_client_leaves(raw.receive, self._first(outputs))
        speech = _Speech(body, first, outputs, voice_id, self._pool)
        if body.wants_sse:
            return _StreamedReply(speech.events(), outputs, "text/event-stream", speech.headers())
        if body.wants_stream:
            media_type = speech.format.media_type
            return _StreamedReply(speech.audio(), outputs, media_type, speech.headers())
        return await unless_client_leaves(raw.receive, speech.file())

    def _check_model(self, model: str | None) -> None:
        if model is not None and model not in self._model_names:
            raise ModelNotFoundError(
                f"The model {model!r} does not exist; served here: {', '.join(self._model_names)}"
            )

    def _check_length(self, text: str) -> None:
        limit = self._config.max_input_chars
        if limit and len(text) > limit:
            raise InvalidRequestError(
                f"input has {len(text)} characters; this server takes up to {limit}", param="input"
            )

    @staticmethod
    async def _voice_id(body: AudioSpeechRequest, engine: EngineClient) -> str:
        if body.reference_audio is not None:
            return _CLONED_VOICE
        assert engine.voices is not None, "a ready engine has its voices"
        voice = await asyncio.to_thread(engine.voices.resolve, body.voice_name)  # may read files
        return voice.voice_id

    async def _build_prompt(self, body: AudioSpeechRequest, info: EngineInfo) -> SpeechPrompt:
        clip = None
        if body.reference_audio is not None:
            clip = await self._clips.load(body.reference_audio, info)
        return SpeechPrompt(
            text=body.input,
            voice=body.voice_name,
            language=body.language,
            instructions=body.instructions,
            system_prompt=body.system_prompt,
            ref_audio=clip,
            ref_text=body.reference_transcript if clip is not None else None,
            normalize=body.normalize is not False,
        )

    async def _first(self, outputs: AsyncIterator[SpeechOutput]) -> SpeechOutput:
        """First audio of a request.

        Raises:
            OverloadedError: too many requests wait for theirs.
        """
        limit = self._config.max_waiting_requests
        if limit and self._num_waiting >= limit:
            raise OverloadedError(f"{limit} requests are waiting already")
        self._num_waiting += 1
        try:
            async for output in outputs:
                if output.audio.size:
                    return output
                if output.finish_reason is not None:
                    raise _no_audio(output.finish_reason)
        finally:
            self._num_waiting -= 1
        raise _no_audio(FinishReason.ERROR)

    async def _generate(
        self, engine: EngineClient, prompt: SpeechPrompt, params: SamplingParams, request_id: str
    ) -> AsyncGenerator[SpeechOutput]:
        """The engine's outputs; counts how the request ended and lets none end in silence."""
        timeout_s = self._config.request_timeout or None
        failure: FinishReason | None = FinishReason.ERROR
        last: SpeechOutput | None = None
        try:
            source = engine.generate(prompt, params, request_id, timeout_s=timeout_s)
            async with aclosing(source):
                async for output in source:
                    last = output if output.finished else None
                    _raise_if_failed(output)
                    yield output
        except InvalidRequestError:
            failure = None  # refused, so it never was a request of the engine
            raise
        except (asyncio.CancelledError, GeneratorExit, RequestAbortedError):
            failure = FinishReason.ABORT
            raise
        finally:
            if last is not None:
                self._metrics.observe_finished(last, max_tokens=params.max_tokens)
            elif failure is not None:
                self._metrics.count_failed(failure)


def _raise_if_failed(output: SpeechOutput) -> None:
    if output.finish_reason is FinishReason.ERROR:
        raise EngineError(output.error or "the engine failed this request")
    if output.finish_reason is FinishReason.ABORT:
        raise RequestAbortedError("the request was aborted")


def _no_audio(reason: FinishReason) -> HiggsAudioError:
    """Why there is nothing to send."""
    if reason is FinishReason.LENGTH:
        return InvalidRequestError(
            "max_tokens leaves no room for audio; the delay of the codebooks takes the first frames",
            param="max_tokens",
        )
    if reason is FinishReason.DEADLINE:
        return OverloadedError("the request took longer than this server allows")
    return EngineError("the model made no audio for this input")


class _Pipe:
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
class _Ending:
    """How a reply ended."""

    reason: FinishReason
    usage: Usage
    stats: SpeechStats
    seed: int


class _Speech:
    """One reply under way: its first output is there, the others follow."""

    def __init__(
        self,
        body: AudioSpeechRequest,
        first: SpeechOutput,
        outputs: AsyncGenerator[SpeechOutput],
        voice_id: str,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.format = lookup(body.audio_format)
        self._first = first
        self._outputs = outputs
        self._voice_id = voice_id
        self._pool = pool
        self._pipe = _Pipe(
            self.format, first.sample_rate, body.speed_factor, streaming=body.wants_stream
        )
        self._ending: _Ending | None = None

    def headers(self) -> dict[str, str]:
        """Headers known before the first byte."""
        return {
            **_STREAM_HEADERS,
            "X-Seed": str(self._first.seed),
            "X-Voice": self._voice_id,
            "X-Sample-Rate": str(self._first.sample_rate),
            "X-Channels": "1",
            "X-Bit-Depth": "16",
        }

    async def audio(self) -> AsyncGenerator[bytes]:
        """Pieces of one valid file, each as soon as it exists."""
        async for output in self._all_outputs():
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

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events: the pieces of ``audio``, then usage, or an error."""
        try:
            async for piece in self.audio():
                encoded = base64.b64encode(piece).decode("ascii")
                yield _event({"type": "speech.audio.delta", "audio": encoded})
        except HiggsAudioError as error:
            logger.error("reply ended with an error event: %s", error)
            body = error_body(error.http_status, str(error), code=error.code)
            yield _event({"type": "speech.audio.error", "error": body["error"]})
            return
        yield _event({"type": "speech.audio.done", **_summary(self._finished())})

    async def file(self) -> Response:
        """The complete file, with its true length, usage and timings."""
        async with aclosing(self._outputs):
            data = b"".join([piece async for piece in self.audio()])
        headers = {**self.headers(), **_end_headers(self._finished())}
        return Response(data, media_type=self.format.media_type, headers=headers)

    async def _all_outputs(self) -> AsyncIterator[SpeechOutput]:
        yield self._first
        async for output in self._outputs:
            yield output

    async def _run(self, function: Any, *args: Any) -> bytes:
        loop = asyncio.get_running_loop()
        data: bytes = await loop.run_in_executor(self._pool, function, *args)
        return data

    def _end(self, last: SpeechOutput, reason: FinishReason) -> None:
        self._ending = _Ending(reason, last.usage, last.stats, last.seed)

    def _finished(self) -> _Ending:
        """The ending; durations are those of the file, so after stretching."""
        assert self._ending is not None, "the audio is complete"
        stats = dataclasses.replace(self._ending.stats, audio_duration_s=self._pipe.duration_s)
        return dataclasses.replace(self._ending, stats=stats)


class _StreamedReply(Response):
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


def _summary(ending: _Ending) -> dict[str, Any]:
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
            "time_to_first_audio_seconds": stats.time_to_first_audio_s,
        },
        "finish_reason": ending.reason.value,
        "seed": ending.seed,
    }


def _end_headers(ending: _Ending) -> dict[str, str]:
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
