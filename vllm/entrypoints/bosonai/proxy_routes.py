"""The routes of the proxy that used to stand before such servers: ``/generate`` and its batch.

Field names, ranges, bodies and headers are those that the proxy's clients know. How speech is
made is the business of ``ServingAudio``.
"""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Body, FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm.entrypoints.bosonai.admission import QUEUE_HEADERS, ticket_maker
from vllm.entrypoints.bosonai.batch_speech import BatchItem, Failure, Spoken, speak_all
from vllm.entrypoints.bosonai.middleware import unless_client_leaves
from vllm.entrypoints.bosonai.response_cache import CACHE_HEADERS
from vllm.entrypoints.bosonai.service_routes import MODE
from vllm.entrypoints.bosonai.serving_audio import ServingAudio
from vllm.entrypoints.bosonai.speech_reply import (
    END_HEADERS,
    FALLBACK_HEADER,
    START_HEADERS,
    summary,
)
from vllm.entrypoints.bosonai.synthesis import Synthesizer
from vllm.entrypoints.openai.errors import fields_named
from vllm.entrypoints.openai.protocol import (
    AudioSpeechRequest,
    Name,
    Priority,
    RequestId,
    SpeakerVoices,
    Text,
    TimeLimit,
)
from vllm.entrypoints.openai.reply_bodies import GenerateResults
from vllm.entrypoints.openai.reply_docs import (
    Replies,
    bytes_of,
    error_replies,
    header_docs,
    json_reply,
)
from vllm.exceptions import InvalidRequestError

if TYPE_CHECKING:
    from vllm.entrypoints.server_config import ServerConfig

__all__ = ["PROXY_HEADERS", "GenerateRequest", "add_proxy_routes"]

PROXY_HEADERS = ("X-Generation-Time", "X-Concurrent-Requests", "X-Mode")

_MAX_ITEMS = 64
# field of the speech route -> what the proxy calls it
_SPEECH_FIELDS = {"input": "text"}
_USUAL_TRANSCRIPT = "Please speak naturally."  # the proxy's, for a clip that came without one
_WAV: Replies = {
    200: {
        "description": "A complete WAV file",
        "content": bytes_of("audio/wav"),
        "headers": header_docs(
            (*START_HEADERS, *QUEUE_HEADERS, *END_HEADERS, *PROXY_HEADERS),
            (FALLBACK_HEADER, *CACHE_HEADERS),
        ),
    },
    **error_replies(400, 422, 499, 500, 503),
}


class GenerateRequest(BaseModel):
    """Body of ``POST /generate``; other fields are ignored."""

    model_config = ConfigDict(allow_inf_nan=False)

    text: Text = Field(description="text to speak")
    system_prompt: Text | None = Field(None, description="replaces the whole system text")
    reference_audio_base64: str | None = Field(None, description="clip to clone")
    reference_text: Text | None = Field(None, description="transcript of the clip")
    temperature: float = Field(1.0, ge=0.1, le=1.5)
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    top_k: int = Field(50, ge=1, le=100)
    max_tokens: int = Field(2048, ge=256, le=8192)
    voice: Name | None = Field(None, description="id or alias of a voice")
    voices: SpeakerVoices
    seed: int | None = Field(None, ge=0, le=2**64 - 1)
    priority: Priority
    timeout_s: TimeLimit
    request_id: RequestId

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_family(cls, data: Any) -> Any:
        if isinstance(data, dict) and "target_text" in data:
            raise InvalidRequestError(
                "target_text belongs to the VoxCPM family, which this version does not serve; "
                "give text",
                param="target_text",
            )
        return data

    def to_speech(self) -> AudioSpeechRequest:
        """The same wish as a speech request.

        Raises:
            InvalidRequestError: the text is blank.
        """
        if not self.text.strip():
            raise InvalidRequestError("Text cannot be empty", param="text")
        clip = self.reference_audio_base64 or None
        words = self.reference_text or ""
        transcript = words if words.strip() else _USUAL_TRANSCRIPT
        return AudioSpeechRequest.model_validate(
            {
                **self.model_dump(exclude={"text", "reference_audio_base64", "reference_text"}),
                "input": self.text,
                "response_format": "wav",
                "stream": False,
                "reference_audio_base64": clip,
                "reference_text": transcript if clip else None,
            }
        )


def add_proxy_routes(
    app: FastAPI, config: ServerConfig, serving: ServingAudio, synthesizer: Synthesizer
) -> None:
    """Add ``POST /generate`` and ``POST /generate/batch``."""

    @app.post("/generate", response_class=Response, responses=_WAV)
    async def generate(body: GenerateRequest, raw: Request) -> Response:
        """Speak a text into a complete WAV file."""
        started_at = time.monotonic()
        with fields_named(_SPEECH_FIELDS):
            speech = body.to_speech()
            ticket = serving.ticket(speech, raw)
            reply = await unless_client_leaves(raw.receive, serving.begin(speech, ticket))
        response = await unless_client_leaves(raw.receive, reply.file())
        values = (f"{time.monotonic() - started_at:.2f}", str(ticket.num_open), MODE)
        response.headers.update(dict(zip(PROXY_HEADERS, values, strict=True)))
        return response

    @app.post(
        "/generate/batch",
        responses={**json_reply(GenerateResults), **error_replies(400, 422, 503)},
    )
    async def generate_batch(
        body: Annotated[list[GenerateRequest], Body(max_length=_MAX_ITEMS)], raw: Request
    ) -> dict[str, Any]:
        """Speak up to 64 texts; each has a result of its own."""
        synthesizer.ready_engine()
        synthesizer.admission.check_room()

        ticket = ticket_maker(raw, config)
        items = [BatchItem(item.to_speech, ticket) for item in body]
        work = speak_all(serving, items, num_together=synthesizer.admission.num_slots)
        results = await unless_client_leaves(raw.receive, work)
        successful = sum(isinstance(result, Spoken) for result in results)
        return {
            "results": [_as_json(index, result) for index, result in enumerate(results)],
            "total": len(results),
            "successful": successful,
            "failed": len(results) - successful,
            "mode": MODE,
        }


def _as_json(index: int, result: Spoken | Failure) -> dict[str, Any]:
    if isinstance(result, Failure):
        error = f"{result.status}: {result.message}"
        return {"index": index, "success": False, "error": error}
    return {
        "index": index,
        "success": True,
        "audio_base64": base64.b64encode(result.data).decode("ascii"),
        "generation_time": round(result.seconds, 2),
        **summary(result.ending),
    }
