"""The speech route: a checked body becomes a stream of encoded audio, SSE events or one file.

The status is decided after the first audio exists. Knows nothing of routes, keys or processes;
how audio is made and sent is in ``synthesis`` and ``speech_reply``.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from vllm.audio import lookup
from vllm.entrypoints.bosonai.admission import Ticket, make_ticket
from vllm.entrypoints.bosonai.middleware import unless_client_leaves
from vllm.entrypoints.bosonai.reference_audio import ReferenceAudioLoader
from vllm.entrypoints.bosonai.response_cache import ReplyKeys, ResponseCache
from vllm.entrypoints.bosonai.speech_reply import (
    FALLBACK_HEADER,
    Reply,
    SpeechReply,
    StreamedReply,
    header_text,
)
from vllm.entrypoints.bosonai.synthesis import Synthesizer
from vllm.entrypoints.openai.errors import fields_named
from vllm.entrypoints.openai.protocol import AudioSpeechRequest, SamplingOptions
from vllm.exceptions import InvalidRequestError, ModelNotFoundError
from vllm.logger import get_logger
from vllm.player import VirtualPlayer
from vllm.prompts import (
    SCENE_VOICE,
    SpeechPrompt,
    Voice,
    is_voice_described,
    resolve_voices,
    voice_id_of,
)

if TYPE_CHECKING:
    from vllm.entrypoints.bosonai.voices import VoiceLibrary
    from vllm.entrypoints.cli_args import ServeArgs
    from vllm.sampling_params import SamplingParams

__all__ = ["PreparedSpeech", "ServingAudio", "log_ignored_fields", "voice_headers"]

logger = get_logger(__name__)


class PreparedSpeech(NamedTuple):
    """A checked body, ready for the engine."""

    prompt: SpeechPrompt
    params: SamplingParams
    voice_id: str


class ServingAudio:
    """Answers ``POST /v1/audio/speech``.

    Args:
        args: model names, limits and defaults.
        synthesizer: runs prompts.
        pool: threads that encode and stretch.
        clips: reads the clips that requests bring along.
        cache: of finished replies; None makes every reply anew.
    """

    def __init__(
        self,
        args: ServeArgs,
        synthesizer: Synthesizer,
        pool: ThreadPoolExecutor,
        clips: ReferenceAudioLoader,
        cache: ResponseCache | None = None,
    ) -> None:
        self._config = args.server
        self._defaults = args.engine.defaults
        self._model_names = args.model_names
        self._synthesizer = synthesizer
        self._pool = pool
        self._clips = clips
        self._cache = cache
        self._keys = ReplyKeys()

    async def create_speech(self, body: AudioSpeechRequest, raw: Request) -> Response:
        """The reply to one request.

        Raises:
            HiggsAudioError: the request is refused, or failed before its first audio.
        """
        ticket = self.ticket(body, raw)
        is_played = body.wants_sse or body.wants_stream
        player = VirtualPlayer(body.speed_factor) if is_played else None
        reply = await unless_client_leaves(raw.receive, self.begin(body, ticket, player=player))
        if body.wants_sse:
            events = reply.events()
            return StreamedReply(events, reply.outputs, "text/event-stream", reply.headers())
        if body.wants_stream:
            media_type = reply.format.media_type
            return StreamedReply(reply.audio(), reply.outputs, media_type, reply.headers())
        return await unless_client_leaves(raw.receive, reply.file())

    def ticket(self, body: SamplingOptions, raw: Request) -> Ticket:
        """Ticket of a request, see ``make_ticket``; an id in the body is sent back."""
        raw.state.request_id = body.request_id or raw.state.request_id
        return make_ticket(
            raw,
            self._config,
            request_id=body.request_id,
            priority=body.priority,
            timeout_s=body.timeout_s,
        )

    async def begin(
        self, body: AudioSpeechRequest, ticket: Ticket, *, player: VirtualPlayer | None = None
    ) -> Reply:
        """The reply to a body, once its first audio exists; ``player`` as in ``Synthesizer``.

        One that was made before and kept is answered at once, however full the server is.

        Raises:
            HiggsAudioError: the request is refused, or failed before its first audio.
        """
        with fields_named(body.spelt):
            return await self._begin(body, ticket, player)

    async def _begin(
        self, body: AudioSpeechRequest, ticket: Ticket, player: VirtualPlayer | None
    ) -> Reply:
        ticket.engine_id = f"audiospeech-{ticket.client_id}-{secrets.token_hex(4)}"
        log_ignored_fields(body, ticket.engine_id)
        self._synthesizer.ready_engine()
        may_hit = self._cache is not None and ticket.uses_cache and body.reference_audio is None
        if not may_hit:
            self._synthesizer.admission.check_room()  # before any work for this request is done
        prepared = await self.prepare(body)
        key = await self._key_of(body, prepared, ticket)
        kept = self._cache.find(key) if self._cache is not None and key is not None else None
        if kept is not None:
            self._synthesizer.admission.pass_by(ticket)
            ticket.record.begin(prepared.prompt)
            kept.extra_headers.update(ticket.headers() | voice_headers(prepared.prompt))
            return kept
        outputs = self._synthesizer.outputs(prepared.prompt, prepared.params, ticket, player=player)
        first = await self._synthesizer.first(outputs)
        reply = SpeechReply(
            first,
            outputs,
            self._pool,
            audio_format=lookup(body.audio_format),
            voice_id=prepared.voice_id,
            speed=body.speed_factor,
            streaming=body.wants_stream,
            extra_headers=ticket.headers() | voice_headers(prepared.prompt),
        )
        if self._cache is None:
            return reply
        reply.extra_headers["X-Cache"] = "miss" if key is not None else "bypass"
        return self._cache.recorded(key, reply) if key is not None else reply

    async def _key_of(
        self, body: AudioSpeechRequest, prepared: PreparedSpeech, ticket: Ticket
    ) -> bytes | None:
        """Key of a reply in the cache; None for one that is neither looked up nor kept."""
        if self._cache is None or not ticket.uses_cache:
            return None
        return await asyncio.to_thread(  # it reads whole clips
            self._keys.key_of,
            prepared.prompt,
            prepared.params,
            self._synthesizer.ready_engine().info,
            body.audio_format,
            body.speed_factor,
            body.wants_stream,
            ticket.owner,
        )

    async def prepare(self, body: AudioSpeechRequest) -> PreparedSpeech:
        """Check everything about a body that can be wrong, and read its clip.

        Raises:
            HiggsAudioError: a field is wrong, or the engine is not there.
        """
        self.check_model(body.model)
        self.check_length(body.input)
        params = body.to_sampling_params(self._defaults)
        prompt = await self._build_prompt(body)
        return PreparedSpeech(prompt, params, voice_id_of(prompt))

    def check_model(self, model: str | None) -> None:
        """Raises ModelNotFoundError unless the model is served; None is the first one."""
        if model is not None and model not in self._model_names:
            raise ModelNotFoundError(
                f"The model {model!r} does not exist; served here: {', '.join(self._model_names)}"
            )

    def check_length(self, text: str, *, field: str = "input") -> None:
        """Raises InvalidRequestError when a text is longer than this server takes."""
        limit = self._config.max_input_chars
        if limit and len(text) > limit:
            raise InvalidRequestError(
                f"{field} has {len(text)} characters; this server takes up to {limit}", param=field
            )

    async def voice(self, name: str | None, system_prompt: str | None) -> Voice:
        """The voice of that id or alias; None is the default voice, or that of a prompt's scene.

        Raises:
            UnknownVoiceError: there is none.
            VoiceStoreError: it is no preset, and the store cannot be asked.
        """
        if name is None and is_voice_described(system_prompt):
            return SCENE_VOICE
        library = self._library()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(library.threads_for(name), library.resolve, name)

    async def voices(self, names: Mapping[str, str]) -> dict[str, Voice]:
        """The voices of speakers; raises InvalidRequestError, which names the speaker."""
        if not names:
            return {}
        library = self._library()
        threads = library.threads_for(*names.values())
        return await asyncio.get_running_loop().run_in_executor(
            threads, resolve_voices, library, names
        )

    def _library(self) -> VoiceLibrary:
        voices = self._synthesizer.ready_engine().voices
        assert voices is not None, "a ready engine has its voices"
        return voices

    async def _build_prompt(self, body: AudioSpeechRequest) -> SpeechPrompt:
        """The prompt of a body, with the voices as they are now."""
        clip, voice = None, None
        voices = await self.voices(body.speaker_voices)
        if not voices and body.reference_audio is None:
            voice = await self.voice(body.voice_name, body.system_prompt)
        if body.reference_audio is not None:
            info = self._synthesizer.ready_engine().info
            assert info is not None, "a ready engine has its info"
            clip = await self._clips.load(body.reference_audio, info)
        return SpeechPrompt(
            text=body.input,
            voice=voice,
            voices=voices,
            language=body.language,
            instructions=body.instructions,
            system_prompt=body.system_prompt,
            ref_audio=clip,
            ref_text=body.reference_transcript if clip is not None else None,
            normalize=body.normalize is not False,
        )


def voice_headers(prompt: SpeechPrompt) -> dict[str, str]:
    """Which voice was asked for where another had to speak instead."""
    asked = [voice.asked_for for voice in _heard(prompt) if voice.asked_for]
    return {FALLBACK_HEADER: header_text(",".join(asked))} if asked else {}


def _heard(prompt: SpeechPrompt) -> list[Voice]:
    heard: list[str | Voice | None] = [prompt.voices[name] for name in prompt.named_speakers]
    return [voice for voice in heard or [prompt.voice] if isinstance(voice, Voice)]


def log_ignored_fields(body: SamplingOptions, request_id: str) -> None:
    """Name the fields of a body that have no meaning here."""
    if body.unknown_fields:
        shown = ", ".join(body.unknown_fields)[:200]
        logger.warning("ignored fields: %r", shown, extra={"request_id": request_id})
