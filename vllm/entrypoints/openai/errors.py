"""Errors into replies: OpenAI's nested body, with the older flat keys beside it.

The one place where an exception becomes an HTTP status. Every failure of the server has this
form, also those of routing and authentication.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from vllm.exceptions import (
    EngineError,
    HiggsAudioError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
)
from vllm.logger import get_logger

__all__ = [
    "error_body",
    "error_response",
    "fields_named",
    "install_error_handlers",
    "log_early_end",
    "read_body",
    "to_response",
]

logger = get_logger(__name__)

BodyT = TypeVar("BodyT", bound=BaseModel)

_RETRY_AFTER_S = 5.0
_MAX_SHOWN = 200  # characters of a refused value that a message repeats

# status -> (type in the nested body, type in the flat keys, code)
_KINDS: dict[int, tuple[str, str, str]] = {
    400: ("invalid_request_error", "BadRequestError", "invalid_value"),
    401: ("authentication_error", "AuthenticationError", "invalid_api_key"),
    403: ("permission_error", "PermissionDeniedError", "forbidden"),
    404: ("not_found_error", "NotFoundError", "not_found"),
    405: ("invalid_request_error", "MethodNotAllowedError", "method_not_allowed"),
    409: ("invalid_request_error", "ConflictError", "conflict"),
    413: ("invalid_request_error", "RequestTooLargeError", "request_too_large"),
    415: ("invalid_request_error", "UnsupportedMediaTypeError", "unsupported_media_type"),
    422: ("invalid_request_error", "UnprocessableEntityError", "invalid_value"),
    429: ("rate_limit_error", "RateLimitError", "rate_limit_exceeded"),
    499: ("invalid_request_error", "RequestAbortedError", "aborted"),
    503: ("service_unavailable_error", "ServiceUnavailableError", "unavailable"),
}
_FIELD = re.compile(r"[a-z][a-z0-9_]*")
_TYPES = frozenset({"str", "int", "float", "bool", "bytes", "dict", "list"})
_OTHER_4XX = ("invalid_request_error", "BadRequestError", "invalid_request")
_OTHER_5XX = ("server_error", "InternalServerError", "internal_error")


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Body of a failure, for every reader: OpenAI's, the older flat one and FastAPI's."""
    nested_type, flat_type, usual_code = _KINDS.get(
        status, _OTHER_4XX if status < 500 else _OTHER_5XX
    )
    return {
        "error": {
            "message": message,
            "type": nested_type,
            "param": param,
            "code": code or usual_code,
        },
        "object": "error",
        "message": message,
        "type": flat_type,
        "param": param,
        "code": status,
        "detail": message,
    }


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_after_s: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Reply of a failure, with the headers that tell a client whether to try again."""
    all_headers = dict(headers or {})
    if status in (429, 503):
        all_headers["Retry-After"] = str(max(1, math.ceil(retry_after_s or _RETRY_AFTER_S)))
    elif status >= 500 or status == 409:  # OpenAI's clients would try both again
        all_headers["x-should-retry"] = "false"
    return JSONResponse(
        error_body(status, message, param=param, code=code), status, headers=all_headers
    )


def to_response(error: Exception, *, validation_status: int = 400) -> JSONResponse:
    """Reply of any exception; unknown ones are logged and told as an internal error."""
    if isinstance(error, HiggsAudioError):
        return _from_known(error)
    if isinstance(error, RequestValidationError):
        return _from_validation(error.errors(), validation_status)
    if isinstance(error, HTTPException):
        return _from_http(error)
    logger.error("unexpected error", exc_info=error)
    return error_response(500, "internal error; the server's log says more")


def log_early_end(error: HiggsAudioError, request_id: str | None = None) -> None:
    """Log that a reply ended before its time: as an error, unless the client was the reason."""
    level = logging.ERROR if error.http_status >= 500 else logging.INFO
    logger.log(level, "reply ended early: %s", error, extra={"request_id": request_id})


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception of ``app`` in this module's form."""

    async def handle(raw: Request, error: Exception) -> JSONResponse:
        reply = to_response(error, validation_status=_validation_status(raw))
        if reply.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            reply.headers["Allow"] = ", ".join(sorted(_methods_here(raw)))
        return reply

    for kind in (HiggsAudioError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


def _methods_here(raw: Request) -> set[str]:
    """Methods of every route of this path; Starlette tells those of the first one only."""
    found: set[str] = set()
    for route in raw.app.routes:
        if route.matches(raw.scope)[0] is not Match.NONE:
            found |= route.methods
    return found


def read_body(model: type[BodyT], fields: Mapping[str, Any]) -> BodyT:
    """A body that came inside another one.

    Raises:
        RequestValidationError: a field is wrong; it is named as in a body of its own.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        problems = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(problems) from error


@contextmanager
def fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors name fields as the client spelt them; ``names`` has our names -> the client's."""
    try:
        yield
    except InvalidRequestError as error:
        error.rename(names)
        raise


def _validation_status(raw: Request) -> int:
    """422 on the proxy's routes, as their clients know it; 400 on all others."""
    path: str = getattr(raw.scope.get("route"), "path", "")
    return 422 if path.startswith("/generate") else 400


def _from_known(error: HiggsAudioError) -> JSONResponse:
    retry_after_s = error.retry_after_s if isinstance(error, OverloadedError) else None
    if isinstance(error, EngineError):
        logger.error("the engine failed a request: %s", error)
    return error_response(
        error.http_status,
        str(error),
        param="model" if isinstance(error, ModelNotFoundError) else getattr(error, "param", None),
        code=error.code,
        retry_after_s=retry_after_s,
    )


def _from_http(error: HTTPException) -> JSONResponse:
    message = str(error.detail)
    if message == HTTPStatus(error.status_code).phrase:
        message = _ROUTING_MESSAGES.get(error.status_code, message)
    return error_response(error.status_code, message, headers=error.headers)


_ROUTING_MESSAGES = {
    404: "Not Found: there is no such route; GET /openapi.json lists those there are",
    405: "Method Not Allowed: this route answers to another method",
}


def _from_validation(problems: Sequence[Any], status: int) -> JSONResponse:
    first = problems[0]
    refused = (first.get("ctx") or {}).get("error")
    if isinstance(refused, InvalidRequestError):
        return _from_known(refused)
    if first["type"] == "json_invalid":
        message = f"the body is not valid JSON: {refused}"
        return error_response(status, message, code="invalid_json")
    param = _field_of(first["loc"])
    message = "; ".join(_sentences(problems))
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return error_response(status, message, param=param, code=code)


def _field_of(location: Sequence[Any]) -> str | None:
    """Name of the field, with dots where it is one of a field; in a list of bodies the index is first.

    What is no name ends it: the place in a list, or the type of several that was tried.
    """
    names = location[1:]
    if not names:
        return None
    path = [str(names[0])]
    if isinstance(names[0], int) and len(names) > 1:
        path.append(str(names[1]))
        names = names[1:]
    for name in names[1:]:
        if not isinstance(name, str) or not _FIELD.fullmatch(name) or name in _TYPES:
            break
        path.append(name)
    return ".".join(path)


def _sentences(problems: Sequence[Any]) -> list[str]:
    """One sentence per field; a field of several types reports each of them."""
    sentences = []
    for problem in problems:
        field = _field_of(problem["loc"]) or "body"
        if problem["type"] == "missing":
            sentences.append(f"{field} is missing")
            continue
        shown = repr(problem.get("input"))
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
        sentences.append(f"{field}={shown} is not allowed: {problem['msg']}")
    return sentences
