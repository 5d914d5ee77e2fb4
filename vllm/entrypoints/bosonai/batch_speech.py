"""Many texts in one request: each becomes a result of its own, and a bad one spoils no other.

Items go through the same steps as single requests, ``max_num_seqs`` of one batch at a time. Knows
nothing of how clients and files write a batch down, except for ``/v1/audio/speech/batch``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from vllm.entrypoints.bosonai.admission import Ticket, ticket_maker
from vllm.entrypoints.bosonai.middleware import unless_client_leaves
from vllm.entrypoints.bosonai.serving_audio import ServingAudio
from vllm.entrypoints.bosonai.speech_reply import Ending, summary
from vllm.entrypoints.bosonai.synthesis import Synthesizer
from vllm.entrypoints.openai.errors import read_body, to_response
from vllm.entrypoints.openai.protocol import AudioSpeechRequest, RequestId, SamplingOptions
from vllm.entrypoints.openai.reply_bodies import SpeechResults
from vllm.entrypoints.openai.reply_docs import error_replies, json_reply

if TYPE_CHECKING:
    from vllm.entrypoints.server_config import ServerConfig

__all__ = [
    "BatchItem",
    "Failure",
    "SpeechBatchRequest",
    "Spoken",
    "add_batch_routes",
    "read_item",
    "speak",
    "speak_all",
    "with_defaults",
]

_MAX_ITEMS = 32
# Fields of which an item that gives one takes none of its batch's.
_SPEECH_SPELLINGS = AudioSpeechRequest.spellings
_GROUPS = (
    ("voice", "voices", *_SPEECH_SPELLINGS["ref_audio"], *_SPEECH_SPELLINGS["ref_text"]),
    *SamplingOptions.spellings.values(),
)


@dataclass(frozen=True)
class Spoken:
    """An item that became a file."""

    data: bytes
    media_type: str
    ending: Ending
    seconds: float  # from its turn to the last byte

    def as_json(self) -> dict[str, Any]:
        """Audio, usage and timings."""
        encoded = base64.b64encode(self.data).decode("ascii")
        return {"audio_data": encoded, "media_type": self.media_type, **summary(self.ending)}


@dataclass(frozen=True)
class Failure:
    """An item that did not; ``body`` is what a single request would have been answered."""

    status: int
    body: Mapping[str, Any]

    @property
    def message(self) -> str:
        return str(self.body["message"])


@dataclass(frozen=True)
class BatchItem:
    """One text of a batch.

    ``body`` makes its request, or raises what is wrong with it; ``ticket`` is for that request.
    """

    body: Callable[[], AudioSpeechRequest]
    ticket: Callable[[AudioSpeechRequest], Ticket]


async def speak(serving: ServingAudio, item: BatchItem) -> Spoken | Failure:
    """The result of one item; only being cancelled is raised."""
    started_at = time.monotonic()
    try:
        body = item.body()
        reply = await serving.begin(body, item.ticket(body))
        data = await reply.data()
    except Exception as error:
        refusal = to_response(error)
        return Failure(refusal.status_code, json.loads(bytes(refusal.body)))
    seconds = time.monotonic() - started_at
    return Spoken(data, reply.format.media_type, reply.ending(), seconds)


async def speak_all(
    serving: ServingAudio, items: Sequence[BatchItem], *, num_together: int
) -> list[Spoken | Failure]:
    """Results of all items, in their order."""
    turns = asyncio.Semaphore(num_together)

    async def in_turn(item: BatchItem) -> Spoken | Failure:
        async with turns:
            return await speak(serving, item)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(in_turn(item)) for item in items]
    return [task.result() for task in tasks]


def read_item(fields: Mapping[str, Any]) -> AudioSpeechRequest:
    """An item in the form of a speech request; always a complete file.

    Raises:
        RequestValidationError: a field is wrong.
    """
    return read_body(AudioSpeechRequest, {**fields, "stream": False})


def with_defaults(fields: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an item, and those of its batch that it does not give itself.

    Null is as good as absent in an item, except in the RAS fields, where it switches RAS off.
    """
    own = {k: v for k, v in fields.items() if v is not None or k.startswith("ras_")}
    replaced = {key for group in _GROUPS if own.keys() & set(group) for key in group}
    return {**{k: v for k, v in shared.items() if k not in replaced}, **own}


class SpeechBatchRequest(BaseModel):
    """Body of ``POST /v1/audio/speech/batch``; other fields are those of items that lack them."""

    model_config = ConfigDict(strict=True, extra="allow")

    request_id: RequestId
    items: Annotated[
        list[dict[str, Any]],
        Field(
            min_length=1,
            max_length=_MAX_ITEMS,
            description="bodies of POST /v1/audio/speech; each is checked on its own",
        ),
    ]


def add_batch_routes(
    app: FastAPI, config: ServerConfig, serving: ServingAudio, synthesizer: Synthesizer
) -> None:
    """Add ``POST /v1/audio/speech/batch``."""

    @app.post(
        "/v1/audio/speech/batch",
        responses={**json_reply(SpeechResults), **error_replies(400, 503)},
    )
    async def create_speech_batch(body: SpeechBatchRequest, raw: Request) -> dict[str, Any]:
        """Speak up to 32 texts; each has a result of its own."""
        synthesizer.ready_engine()
        synthesizer.admission.check_room()

        raw.state.request_id = body.request_id or raw.state.request_id
        ticket = ticket_maker(raw, config)
        shared = body.model_extra or {}
        items = [
            BatchItem(partial(read_item, with_defaults(fields, shared)), ticket)
            for fields in body.items
        ]
        work = speak_all(serving, items, num_together=synthesizer.admission.num_slots)
        results = await unless_client_leaves(raw.receive, work)
        succeeded = sum(isinstance(result, Spoken) for result in results)
        return {
            "results": [_as_json(index, result) for index, result in enumerate(results)],
            "total": len(results),
            "succeeded": succeeded,
            "failed": len(results) - succeeded,
        }


def _as_json(index: int, result: Spoken | Failure) -> dict[str, Any]:
    if isinstance(result, Spoken):
        return {"index": index, "status": "success", **result.as_json()}
    return {"index": index, "status": "error", "error": result.body["error"]}
