"""One line of the log for each request that speaks, where ``--enable-log-requests`` asks for it.

Texts are shown only as far as ``--max-log-len`` allows, keys never. What is logged is noted by
``Synthesizer``; routes know nothing of it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm.logger import get_logger
from vllm.outputs import SpeechOutput
from vllm.prompts import SpeechPrompt, voice_id_of

__all__ = ["RequestLogMiddleware", "SpeechRecord"]

logger = get_logger("vllm.requests")

_NO_REPLY = 499  # the client left before there was one
_MAX_PATH = 80


@dataclass
class SpeechRecord:
    """What one utterance was, noted while it is made."""

    prompt: SpeechPrompt | None = field(default=None, repr=False)
    last: SpeechOutput | None = field(default=None, repr=False)
    audio_s: float = 0.0  # before stretching

    def begin(self, prompt: SpeechPrompt) -> None:
        """The engine is asked for this prompt."""
        self.prompt = prompt

    def add(self, output: SpeechOutput) -> None:
        """The engine has made this increment."""
        self.last = output
        self.audio_s += output.audio.size / output.sample_rate

    def fields(self, max_text: int) -> dict[str, str]:
        """What the log shows, with up to ``max_text`` characters of the text."""
        if self.prompt is None:
            return {}
        text = self.prompt.text or ""
        shown = {"voice": voice_id_of(self.prompt), "characters": str(len(text))}
        if self.last is not None:
            shown["seed"] = str(self.last.seed)
            shown["finish_reason"] = str(self.last.finish_reason or "incomplete")
            shown["audio_seconds"] = f"{self.audio_s:.2f}"
            stats = self.last.stats
            if self.last.finished and stats.time_to_first_audio_s is not None:
                shown["queue_seconds"] = f"{stats.queue_time_s:.3f}"
                shown["first_audio_seconds"] = f"{stats.time_to_first_audio_s:.3f}"
        if max_text:
            cut = text if len(text) <= max_text else f"{text[:max_text]}…"
            shown["text"] = json.dumps(cut, ensure_ascii=False)  # one line, whatever it holds
        return shown


class RequestLogMiddleware:
    """Writes the lines when replies have ended; one request may hold several utterances.

    Args:
        app: answers.
        max_text: characters of a text that are shown; 0 shows none.
    """

    def __init__(self, app: ASGIApp, max_text: int) -> None:
        self._app = app
        self._max_text = max_text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        records: list[SpeechRecord] = scope.setdefault("state", {}).setdefault("records", [])
        started_s, status = time.monotonic(), _NO_REPLY

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            seconds = f"{time.monotonic() - started_s:.3f}"
            common = {"route": _route_of(scope), "status": str(status), "seconds": seconds}
            for record in records or [SpeechRecord()]:
                self._write(common | record.fields(self._max_text), scope)

    @staticmethod
    def _write(fields: dict[str, str], scope: Scope) -> None:
        line = " ".join(f"{name}={value}" for name, value in fields.items())
        logger.info("%s", line, extra={"request_id": scope["state"]["request_id"]})


def _route_of(scope: Scope) -> str:
    """Path of the route that answered, or what was asked for, on one line."""
    path = getattr(scope.get("route"), "path", None)
    return path if path is not None else json.dumps(scope["path"][:_MAX_PATH])
