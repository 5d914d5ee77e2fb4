"""Replies in the OpenAPI document: statuses, content types, headers; bodies are in ``reply_bodies``.

Tells what is so and changes nothing of it. Knows no route.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.openai.reply_bodies import ErrorBody

__all__ = [
    "ERROR_MEANINGS",
    "Replies",
    "bytes_of",
    "error_replies",
    "events_of",
    "header_docs",
    "json_reply",
]

#: As FastAPI takes them: status -> what its reply holds.
Replies = dict[int | str, dict[str, Any]]

#: What each status of a failure means; ``error_replies`` takes its texts from here.
ERROR_MEANINGS = {
    400: "A field is missing, wrong or out of range, or the body cannot be read",
    401: "The key is missing or wrong; only where the server has keys",
    403: "The voice ships with the server, or the server keeps no uploads",
    404: "What the request names does not exist",
    405: "The route answers to another method",
    409: "The name is taken, or there is no room for one more",
    413: "The body is too large",
    415: "The content type is not one that the route takes",
    422: "A field is missing, wrong or out of range, or the body cannot be read",
    429: "The key is beyond its limits; only where the server has limits",
    499: "The request was ended by POST /cancel",
    500: "The engine failed this request before its first audio",
    503: "The model is loading, too many requests are open, or the engine or the voices are gone",
}

_INTEGERS = frozenset(
    {
        "X-Seed",
        "X-Sample-Rate",
        "X-Channels",
        "X-Bit-Depth",
        "X-Queue-Position",
        "X-Concurrent-Requests",
        "X-Usage-Prompt-Tokens",
        "X-Usage-Completion-Tokens",
        "X-Usage-Audio-Tokens",
        "X-Usage-Total-Tokens",
        "Retry-After",
        "Age",
    }
)
_NUMBERS = frozenset(
    {
        "X-Audio-Duration-Seconds",
        "X-Processing-Time-Seconds",
        "X-Realtime-Factor",
        "X-RTF",
        "X-Generation-Time",
    }
)
_ERROR_HEADERS: dict[int, Sequence[str]] = {
    401: ("WWW-Authenticate",),
    409: ("X-Should-Retry",),
    429: ("Retry-After",),
    500: ("X-Should-Retry",),
    503: ("Retry-After",),
}


def header_docs(always: Sequence[str], sometimes: Sequence[str] = ()) -> dict[str, Any]:
    """Headers of a reply; their types follow from their names."""
    return {
        name: {"required": name in always, "schema": {"type": _type_of_header(name)}}
        for name in (*always, *sometimes)
    }


def _type_of_header(name: str) -> str:
    if name in _INTEGERS:
        return "integer"
    return "number" if name in _NUMBERS else "string"


def error_replies(*statuses: int) -> Replies:
    """Failures in the one form that this server has for them."""
    replies: Replies = {}
    for status in statuses:
        replies[status] = {"model": ErrorBody, "description": ERROR_MEANINGS[status]}
        if status in _ERROR_HEADERS:
            replies[status]["headers"] = header_docs(_ERROR_HEADERS[status])
    return replies


def json_reply(model: Any, description: str = "Done", headers: Any = None) -> Replies:
    """A reply of status 200 with a JSON body."""
    return {200: {"model": model, "description": description, "headers": headers or {}}}


def bytes_of(*media_types: str) -> dict[str, Any]:
    """Contents that are files, by their content types."""
    return {kind: {"schema": {"type": "string", "format": "binary"}} for kind in media_types}


def events_of(*names: str) -> dict[str, Any]:
    """Contents that are server-sent events of these names, each with JSON as its data."""
    event = {
        "type": "object",
        "required": ["data"],
        "properties": {"event": {"enum": list(names)}, "data": {"type": "string"}},
    }
    return {"text/event-stream": {"itemSchema": event}}
