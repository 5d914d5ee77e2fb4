"""The OpenAPI document: what FastAPI derives from the routes, made true of all around them.

Adds what middleware and error handlers do to every route. What a route itself answers is written
beside that route.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from vllm.entrypoints.bosonai.middleware import OPEN_PATHS
from vllm.entrypoints.openai.reply_docs import ERROR_MEANINGS, error_replies, header_docs

__all__ = ["DescribedApp"]

_ERROR_SCHEMA = {"$ref": "#/components/schemas/ErrorBody"}
_KEY_SCHEME = "key"
_ID_HEADER = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "name of the request, sent back; a random one is given where it is missing",
    "schema": {"type": "string"},
}
_TIMEOUT_HEADER = {
    "name": "X-Request-Timeout",
    "in": "header",
    "description": "seconds until the request ends as it is; of several limits the shortest counts",
    "schema": {"type": "string", "pattern": r"^([0-9]{1,9}(\.[0-9]*)?|\.[0-9]+)$"},
}
_HELLO = [{"role": "user", "content": "Hello."}]
#: Bodies that work as they stand, for readers and for programs that make bodies from them.
_EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/audio/speech": {
        "streamed": {"input": "Hello.", "voice": "en_woman", "seed": 42},
        "file": {"input": "Hello.", "response_format": "wav", "stream": False},
        "events": {"input": "Hello.", "response_format": "pcm", "stream_format": "sse"},
    },
    "/v1/chat/completions": {
        "file": {"messages": _HELLO, "audio": {"voice": "en_woman", "format": "wav"}},
        "streamed": {"messages": _HELLO, "stream": True},
    },
    "/v1/audio/speech/batch": {
        "two": {"items": [{"input": "One."}, {"input": "Two.", "voice": "en_man"}]}
    },
    "/generate": {"file": {"text": "Hello.", "temperature": 0.7}},
    "/generate/batch": {"two": [{"text": "One."}, {"text": "Two.", "seed": 2}]},
    "/tokenize": {"text": {"prompt": "Hello."}, "request": {"input": "Hello."}},
    "/detokenize": {"one": {"tokens": [72]}},
    "/cancel": {"one": {"request_id": "my-request-1"}},
    "/v1/audio/voices": {
        "described": {"name": "Storyteller", "type": "prompt", "prompt": "A calm, low voice."}
    },
}
_SPEAKING_PATHS = frozenset(
    {
        "/v1/audio/speech",
        "/v1/chat/completions",
        "/v1/audio/speech/batch",
        "/generate",
        "/generate/batch",
    }
)


class DescribedApp(FastAPI):
    """An application whose document leaves nothing out.

    Args:
        needs_key: clients must send a key; the document then says so.
        options: of FastAPI.
    """

    def __init__(self, *, needs_key: bool, **options: Any) -> None:
        super().__init__(**options)
        self._needs_key = needs_key

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            _drop_unused(document)
            for path, methods in document["paths"].items():
                for method, operation in methods.items():
                    _complete(operation, path, method)
            if self._needs_key:
                _add_key(document)
        assert self.openapi_schema is not None, "FastAPI keeps what it made"
        return self.openapi_schema


def _drop_unused(document: dict[str, Any]) -> None:
    """Take out FastAPI's own body of a 422, which this server never sends."""
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for methods in document["paths"].values():
        for operation in methods.values():
            content = operation["responses"].get("422", {}).get("content", {})
            if "HTTPValidationError" in str(content):
                del operation["responses"]["422"]


def _complete(operation: dict[str, Any], path: str, method: str) -> None:
    """Add what happens before a route is reached, and what every reply carries."""
    replies = operation["responses"]
    if path not in OPEN_PATHS:
        _add_errors(replies, 401)
    if method == "post":
        _add_errors(replies, 413, 415, 429)
    for reply in replies.values():
        reply["headers"] = {**header_docs(("X-Request-Id",)), **reply.get("headers", {})}
    operation["responses"] = {status: replies[status] for status in sorted(replies)}
    parameters = operation.setdefault("parameters", [])
    parameters.append(_ID_HEADER)
    if path in _SPEAKING_PATHS:
        parameters.append(_TIMEOUT_HEADER)
    if path in _EXAMPLES and method == "post":
        body = operation["requestBody"]["content"]["application/json"]
        body["examples"] = {name: {"value": value} for name, value in _EXAMPLES[path].items()}


def _add_errors(replies: dict[str, Any], *statuses: int) -> None:
    for status, reply in error_replies(*statuses).items():
        replies[str(status)] = {
            "description": ERROR_MEANINGS[int(status)],
            "content": {"application/json": {"schema": _ERROR_SCHEMA}},
            "headers": reply.get("headers", {}),
        }


def _add_key(document: dict[str, Any]) -> None:
    schemes = document["components"].setdefault("securitySchemes", {})
    schemes[_KEY_SCHEME] = {"type": "http", "scheme": "bearer"}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["security"] = [] if path in OPEN_PATHS else [{_KEY_SCHEME: []}]
