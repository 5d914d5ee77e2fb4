"""Chat completions: a conversation becomes a prompt, its answer is audio in OpenAI's shape.

Plain answers are one JSON object, streamed ones are chunks in server-sent events. How audio is
made and encoded is in ``synthesis`` and ``speech_reply``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vllm.audio import lookup
from vllm.entrypoints.bosonai.admission import QUEUE_HEADERS
from vllm.entrypoints.bosonai.middleware import unless_client_leaves
from vllm.entrypoints.bosonai.recent_replies import RecentReplies
from vllm.entrypoints.bosonai.reference_audio import ReferenceAudioLoader
from vllm.entrypoints.bosonai.serving_audio import (
    PreparedSpeech,
    ServingAudio,
    log_ignored_fields,
    voice_headers,
)
from vllm.entrypoints.bosonai.speech_reply import (
    END_HEADERS,
    FALLBACK_HEADER,
    START_HEADERS,
    Ending,
    SpeechReply,
    StreamedReply,
    end_headers,
    summary,
)
from vllm.entrypoints.bosonai.synthesis import Synthesizer
from vllm.entrypoints.openai.chat_protocol import ChatCompletionRequest, ReferenceTurn
from vllm.entrypoints.openai.errors import error_body, fields_named, log_early_end
from vllm.entrypoints.openai.reply_bodies import ChatCompletion
from vllm.entrypoints.openai.reply_docs import Replies, error_replies, events_of, header_docs
from vllm.exceptions import EngineError, HiggsAudioError, InvalidRequestError
from vllm.outputs import FinishReason, SpeechOutput
from vllm.player import VirtualPlayer
from vllm.prompts import PromptClip, SpeechPrompt, SpokenTurn, voice_id_of

if TYPE_CHECKING:
    from vllm.entrypoints.cli_args import ServeArgs

__all__ = ["ServingChat", "add_chat_routes"]

# field of the speech route -> where a chat has it
_CHAT_FIELDS = {
    "input": "messages",
    "instructions": "messages",
    "system_prompt": "messages",
    "history": "messages",
    "ref_audio": "messages",
    "voice": "audio.voice",
    "voices": "audio.voices",
}
# Base64 text of pieces of this size can be joined: no padding inside, no sample torn.
_JOINABLE_BYTES = 6


class ServingChat:
    """Answers ``POST /v1/chat/completions``.

    Args:
        args: model names, limits and defaults.
        synthesizer: runs prompts.
        pool: threads that encode.
        clips: reads the clips that requests bring along.
        speech: the speech route, whose checks hold here too.
    """

    def __init__(
        self,
        args: ServeArgs,
        synthesizer: Synthesizer,
        pool: ThreadPoolExecutor,
        clips: ReferenceAudioLoader,
        speech: ServingAudio,
    ) -> None:
        self._defaults = args.engine.defaults
        self._model_name = args.model_names[0]
        self._synthesizer = synthesizer
        self._pool = pool
        self._clips = clips
        self._speech = speech
        self._recent = RecentReplies()

    async def create_completion(self, body: ChatCompletionRequest, raw: Request) -> Response:
        """The reply to one request.

        Raises:
            HiggsAudioError: the request is refused, or failed before its first audio.
        """
        ticket = self._speech.ticket(body, raw)
        ticket.engine_id = f"chatcmpl-{ticket.client_id}-{secrets.token_hex(4)}"
        log_ignored_fields(body, ticket.engine_id)
        self._synthesizer.ready_engine()
        self._synthesizer.admission.check_room()  # before any work for this request is done
        recording = _Recording()
        with fields_named(_CHAT_FIELDS):
            prepare = self.prepare(body, ticket.owner)
            prepared = await unless_client_leaves(raw.receive, prepare)
            source = self._synthesizer.outputs(
                prepared.prompt,
                prepared.params,
                ticket,
                player=VirtualPlayer() if body.stream else None,
            )
            outputs = recording.of(source)
            first = await unless_client_leaves(raw.receive, self._first(outputs, recording))
        reply = SpeechReply(
            first,
            outputs,
            self._pool,
            audio_format=lookup(body.audio_format),
            voice_id=prepared.voice_id,
            streaming=bool(body.stream),
            extra_headers=ticket.headers() | voice_headers(prepared.prompt),
        )
        answer = _Answer(
            reply,
            text=body.conversation.text,
            model=body.model or self._model_name,
            owner=ticket.owner,
            recording=recording,
            recent=self._recent,
        )
        if body.stream:
            chunks = answer.events(has_usage_chunk=body.wants_usage_chunk)
            return StreamedReply(chunks, reply.outputs, "text/event-stream", reply.headers())
        content = await unless_client_leaves(raw.receive, answer.completion())
        headers = {**reply.headers(), **end_headers(reply.ending())}
        # A long answer is tens of megabytes of text, which must not hold up the streams of others.
        return await asyncio.to_thread(JSONResponse, content, headers=headers)

    async def _first(
        self, outputs: AsyncGenerator[SpeechOutput], recording: _Recording
    ) -> SpeechOutput:
        """The first output with audio; the last one where the model chose to say nothing."""
        try:
            return await self._synthesizer.first(outputs)
        except EngineError:
            last = recording.last
            if last is None or last.finish_reason is not FinishReason.STOP:
                raise
            return last

    async def prepare(self, body: ChatCompletionRequest, owner: str) -> PreparedSpeech:
        """Check everything about a body that can be wrong, and read its clips.

        Raises:
            HiggsAudioError: a field is wrong, or the engine is not there.
        """
        conversation = body.conversation
        self._speech.check_model(body.model)
        self._speech.check_length(conversation.text)
        params = body.to_sampling_params(self._defaults)
        turns = [await self._turn(reference, owner) for reference in conversation.references]
        # A clip that opens the conversation is the voice; an earlier reply speaks in one already.
        voices = await self._speech.voices(body.speaker_voices)
        is_cloned = bool(turns) and turns[0].clip.samples is not None and not voices
        voice = None
        if not is_cloned and not voices:
            voice = await self._speech.voice(body.voice_name, conversation.system_prompt)
        prompt = SpeechPrompt(
            text=conversation.text,
            voice=voice,
            voices=voices,
            language=body.language,
            instructions=conversation.scene,
            system_prompt=conversation.system_prompt,
            ref_audio=turns[0].clip.samples if is_cloned else None,
            ref_text=turns[0].text if is_cloned else None,
            history=tuple(turns[1:] if is_cloned else turns),
            normalize=body.normalize is not False,
        )
        return PreparedSpeech(prompt, params, voice_id_of(prompt))

    async def _turn(self, reference: ReferenceTurn, owner: str) -> SpokenTurn:
        if reference.audio_id is not None:
            return self._earlier_reply(reference.audio_id, reference.place, owner)
        assert reference.clip is not None, "a reference has a clip or an id"
        info = self._synthesizer.ready_engine().info
        assert info is not None, "a ready engine has its info"
        try:
            samples = await self._clips.load(reference.clip, info)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{reference.place}: {error}", param="messages") from error
        num_frames = samples.size // info.hop_length
        return SpokenTurn(reference.text, PromptClip(num_frames, samples=samples))

    def _earlier_reply(self, audio_id: str, place: str, owner: str) -> SpokenTurn:
        turn = self._recent.find(audio_id, owner)
        if turn is None:
            raise InvalidRequestError(
                f"{place}: audio.id={audio_id!r} names no reply that this server still has; "
                "replies are kept until their expires_at. Send the clip as input_audio",
                param="messages",
            )
        return turn


@dataclass
class _Recording:
    """What passed of a request's outputs."""

    codes: list[NDArray[np.int16]] = field(default_factory=list)
    last: SpeechOutput | None = None

    async def of(self, outputs: AsyncGenerator[SpeechOutput]) -> AsyncGenerator[SpeechOutput]:
        """The outputs, unchanged; closed with this generator."""
        async with aclosing(outputs):
            async for output in outputs:
                self.codes.append(output.codes)
                self.last = output
                yield output

    @property
    def num_frames(self) -> int:
        return sum(codes.shape[1] for codes in self.codes)

    def turn(self, text: str) -> SpokenTurn:
        """The reply as context of a later request."""
        codes = np.concatenate(self.codes, axis=1)
        return SpokenTurn(text, PromptClip(codes.shape[1], codes=codes))


@dataclass
class _Answer:
    """One reply in OpenAI's shape; ``recording`` is of the outputs that ``reply`` reads."""

    reply: SpeechReply
    text: str
    model: str
    owner: str
    recording: _Recording
    recent: RecentReplies
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    audio_id: str = field(default_factory=lambda: f"audio-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def completion(self) -> dict[str, Any]:
        """The whole answer as one object."""
        data = await self.reply.data()
        ending = self.reply.ending()
        audio = None
        if self.recording.num_frames:
            audio = {
                "id": self.audio_id,
                "data": base64.b64encode(data).decode("ascii"),
                "expires_at": self._expires_at(),
                "transcript": self.text,
            }
        message = {"role": "assistant", "content": None, "refusal": None, "audio": audio}
        choice = {"index": 0, "message": message, "logprobs": None, **_finish(ending)}
        return {**self._frame("chat.completion"), "choices": [choice], **_figures(ending)}

    async def events(self, *, has_usage_chunk: bool) -> AsyncGenerator[bytes]:
        """The answer as server-sent events; a failure is one of them."""
        empty = {"usage": None} if has_usage_chunk else {}
        try:
            async with aclosing(self._deltas()) as deltas:
                async for delta in deltas:
                    yield self._chunk([{"index": 0, "delta": delta, "finish_reason": None}], empty)
        except HiggsAudioError as error:
            log_early_end(error)
            body = error_body(error.http_status, str(error), code=error.code)
            yield _event({"error": body["error"]})
            yield _DONE
            return
        ending = self.reply.ending()
        figures = _figures(ending)
        last = [{"index": 0, "delta": {}, **_finish(ending)}]
        yield self._chunk(last, empty if has_usage_chunk else figures)
        if has_usage_chunk:
            yield self._chunk([], figures)
        yield _DONE

    async def _deltas(self) -> AsyncGenerator[dict[str, Any]]:
        """Role, id and transcript; audio as it is made; when the reply will be gone.

        The id comes once: clients that add up the deltas, OpenAI's own among them, join texts.
        """
        opening: dict[str, Any] = {"role": "assistant", "content": None}
        has_audio = self.recording.num_frames > 0
        if has_audio:
            opening["audio"] = {"id": self.audio_id, "transcript": self.text}
        yield opening
        rest = b""
        async with aclosing(self.reply.audio()) as pieces:
            async for piece in pieces:
                data = rest + piece
                size = len(data) - len(data) % _JOINABLE_BYTES
                rest = data[size:]
                if size:
                    yield {"audio": {"data": base64.b64encode(data[:size]).decode("ascii")}}
        if rest:
            yield {"audio": {"data": base64.b64encode(rest).decode("ascii")}}
        if has_audio:
            yield {"audio": {"expires_at": self._expires_at()}}

    def _expires_at(self) -> int:
        """Until when later requests may name this reply, in seconds of the epoch."""
        return self.recent.keep(self.audio_id, self.recording.turn(self.text), self.owner)

    def _chunk(self, choices: list[dict[str, Any]], more: Mapping[str, Any]) -> bytes:
        return _event({**self._frame("chat.completion.chunk"), "choices": choices, **more})

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _finish(ending: Ending) -> dict[str, str]:
    """OpenAI's reason, and the engine's own beside it."""
    is_whole = ending.reason is FinishReason.STOP
    return {
        "finish_reason": "stop" if is_whole else "length",
        "stop_reason": ending.reason.value,
    }


def _figures(ending: Ending) -> dict[str, Any]:
    usage = ending.usage
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {
                "audio_tokens": usage.prompt_audio_tokens,
                "cached_tokens": usage.cached_tokens,
            },
            "completion_tokens_details": {"audio_tokens": usage.audio_tokens},
        },
        "stats": summary(ending)["stats"],
    }


_DONE = b"data: [DONE]\n\n"


def _event(payload: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(payload, separators=(',', ':'))}\n\n".encode()


_REPLIES: Replies = {
    200: {
        "model": ChatCompletion,
        "description": "A completion whose message is audio, or its chunks",
        "content": events_of("message"),
        "headers": header_docs((*START_HEADERS, *QUEUE_HEADERS), (*END_HEADERS, FALLBACK_HEADER)),
    },
    **error_replies(400, 404, 499, 500, 503),
}


def add_chat_routes(app: FastAPI, serving: ServingChat) -> None:
    """Add the route to an application."""

    @app.post("/v1/chat/completions", response_class=Response, responses=_REPLIES)
    async def create_chat_completion(body: ChatCompletionRequest, raw: Request) -> Response:
        """Speak the last user message of a conversation."""
        return await serving.create_completion(body, raw)
