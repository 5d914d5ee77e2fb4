"""What every request passes before its route: id, key, content type, size, and the last resort.

Plain ASGI, so that replies are never buffered. Knows no route by name.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm.entrypoints.openai.errors import error_response, log_early_end, to_response
from vllm.exceptions import HiggsAudioError, RequestAbortedError
from vllm.logger import get_logger

__all__ = [
    "OPEN_PATHS",
    "ApiKeyMiddleware",
    "BodyRulesMiddleware",
    "KeyLimitMiddleware",
    "LastResortMiddleware",
    "RequestIdMiddleware",
    "unless_client_leaves",
]

logger = get_logger(__name__)

_T = TypeVar("_T")
_UNSAFE = re.compile(r"[^\x21-\x7e]")
_MAX_ID_LENGTH = 128

#: Paths that managers, scrapers and people read without a key.
OPEN_PATHS = frozenset(
    {"/health", "/ping", "/version", "/metrics", "/docs", "/redoc", "/openapi.json"}
)
_JSON, _FORM = "application/json", "multipart/form-data"


def _path_of(scope: Scope) -> str:
    """Path without the prefix that a proxy stands for."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :]
    return path


class RequestIdMiddleware:
    """Gives each request the client's id or a random one, and sends it back; notes the time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _UNSAFE.sub("", Headers(scope=scope).get("x-request-id", ""))[:_MAX_ID_LENGTH]
        request_id = given or secrets.token_hex(16)
        scope.setdefault("state", {}).update(request_id=request_id, arrived_at=time.monotonic())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                # a route may have taken another id from the body
                MutableHeaders(scope=message)["X-Request-Id"] = scope["state"]["request_id"]
            await send(message)

        await self._app(scope, receive, send_with_id)


class LastResortMiddleware:
    """Turns an exception that no handler took into a 500, or breaks off a reply under way.

    A reply that has begun cannot become an error any more. Returning without its last message
    makes the server close the connection, so the client sees that the reply is incomplete.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def watch(message: Message) -> None:
            nonlocal has_started
            has_started = has_started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except ClientDisconnect:
            return  # amid its body, so there is nobody to answer
        except Exception as error:
            if scope["type"] != "http":
                raise
            if not has_started:
                await to_response(error)(scope, receive, send)
                return
            _log_broken_reply(error, scope["state"]["request_id"])


def _log_broken_reply(error: Exception, request_id: str) -> None:
    if isinstance(error.__cause__, HiggsAudioError):
        error = error.__cause__  # Starlette wraps what it may not handle any more
    if isinstance(error, HiggsAudioError):
        log_early_end(error, request_id)
    else:
        logger.error("reply broken off", exc_info=error, extra={"request_id": request_id})


class ApiKeyMiddleware:
    """Asks for ``Authorization: Bearer KEY`` on every path but ``OPEN_PATHS``; OPTIONS is exempt."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._is_guarded(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        response = error_response(
            401,
            "Unauthorized: send 'Authorization: Bearer KEY' with a key of this server",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await response(scope, receive, send)

    @staticmethod
    def _is_guarded(scope: Scope) -> bool:
        return scope["method"] != "OPTIONS" and _path_of(scope) not in OPEN_PATHS

    def _has_key(self, scope: Scope) -> bool:
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        token = given.strip().encode("latin-1")
        matches = [secrets.compare_digest(token, key) for key in self._keys]
        return kind.lower() == "bearer" and any(matches)


class KeyLimitMiddleware:
    """Refuses POST requests beyond a key's limits with a 429; sits behind ``ApiKeyMiddleware``.

    Args:
        app: takes what is let through.
        per_minute: requests in any 60 seconds, refused ones left out; 0 is no limit.
        at_once: requests whose replies are not complete; 0 is no limit.
        free_paths: of requests that neither count nor are refused.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        per_minute: int,
        at_once: int,
        free_paths: Collection[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._per_minute = per_minute
        self._at_once = at_once
        self._free_paths = free_paths
        self._clock = clock
        self._arrivals: defaultdict[str, deque[float]] = defaultdict(deque)
        self._num_open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._counts(scope):
            await self._app(scope, receive, send)
            return
        key = Headers(scope=scope).get("authorization", "").partition(" ")[2].strip()
        refusal = self._refusal(key)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._num_open[key] += 1
        is_open = True

        def close() -> None:
            nonlocal is_open
            self._num_open[key] -= is_open
            is_open = False

        async def watch(message: Message) -> None:
            # Before it is sent: a client that has all of a reply may send the next request at once.
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                close()
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            close()

    def _counts(self, scope: Scope) -> bool:
        return scope["method"] == "POST" and _path_of(scope) not in self._free_paths

    def _refusal(self, key: str) -> Response | None:
        """The reply to a request that is one too many; otherwise the request is counted."""
        if self._at_once and self._num_open[key] >= self._at_once:
            return error_response(
                429, f"{self._at_once} requests of this key are running already", retry_after_s=1.0
            )
        if not self._per_minute:
            return None
        now, arrivals = self._clock(), self._arrivals[key]
        while arrivals and arrivals[0] <= now - 60.0:
            arrivals.popleft()
        if len(arrivals) >= self._per_minute:
            return error_response(
                429,
                f"this key may send {self._per_minute} requests in a minute",
                retry_after_s=arrivals[0] + 60.0 - now,
            )
        arrivals.append(now)
        return None


class BodyRulesMiddleware:
    """Lets through only JSON bodies (415 otherwise) of bounded size (413 otherwise).

    Args:
        app: takes what is let through.
        max_bytes: size of the largest body.
        multipart_paths: where forms are let through too.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, multipart_paths: Collection[str] = frozenset()
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._multipart_paths = multipart_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        takes_forms = _path_of(scope) in self._multipart_paths
        if kind != _JSON and not (takes_forms and kind == _FORM) and _has_route(scope):
            allowed = f"'{_JSON}' and '{_FORM}' are" if takes_forms else f"'{_JSON}' is"
            response = error_response(415, f"Unsupported Media Type: Only {allowed} allowed")
            await response(scope, receive, send)
            return
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_bytes:
            await to_response(self._too_large())(scope, receive, send)
            return
        await self._app(scope, self._counting(receive), send)

    def _counting(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> HTTPException:
        limit_mib = self._max_bytes / 2**20
        return HTTPException(413, f"the body is larger than {limit_mib:g} MiB (--max-body-mib)")


def _has_route(scope: Scope) -> bool:
    """Whether some route takes this path and method; if none does, that is the thing to say."""
    return any(route.matches(scope)[0] is Match.FULL for route in scope["app"].routes)


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Result of ``work``, which is cancelled and awaited when the client disconnects first.

    Raises:
        RequestAbortedError: the client left.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise RequestAbortedError("the client closed the connection")
        return worker.result()
    finally:
        watcher.cancel()
        worker.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
