"""From a checked prompt to the engine's outputs: admission, first audio, counting, clean ends.

Every route that speaks goes through here, so that limits and figures hold over all of them. Knows
neither request bodies nor audio formats.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from vllm.entrypoints.bosonai.admission import Admission, Ticket
from vllm.entrypoints.bosonai.engine_host import EngineClient, EngineHost
from vllm.exceptions import (
    EngineError,
    HiggsAudioError,
    InvalidRequestError,
    OverloadedError,
    RequestAbortedError,
)
from vllm.outputs import FinishReason, SpeechOutput

if TYPE_CHECKING:
    from vllm.entrypoints.server_config import ServerConfig
    from vllm.player import VirtualPlayer
    from vllm.prompts import SpeechPrompt
    from vllm.sampling_params import SamplingParams
    from vllm.v1.metrics import SpeechMetrics

__all__ = ["Synthesizer"]


class Synthesizer:
    """Runs prompts through the engine, whichever route they came by.

    Args:
        config: limits of the server.
        host: of the engine.
        metrics: where requests are counted.
    """

    def __init__(self, config: ServerConfig, host: EngineHost, metrics: SpeechMetrics) -> None:
        self._host = host
        self._metrics = metrics
        self.admission = Admission(config.max_concurrent_connections, self._num_slots)

    def _num_slots(self) -> int:
        info = self._host.engine.info
        return info.max_num_seqs if info is not None else 0

    def ready_engine(self) -> EngineClient:
        """The engine; raises OverloadedError while it loads and EngineDeadError when it is gone."""
        return self._host.ready_engine()

    def outputs(
        self,
        prompt: SpeechPrompt,
        params: SamplingParams,
        ticket: Ticket,
        *,
        player: VirtualPlayer | None = None,
    ) -> AsyncGenerator[SpeechOutput]:
        """Outputs of one request, to be closed by whoever takes them; see ``AsyncLLM.generate``.

        The request is let in when the first output is asked for, which raises OverloadedError when
        the server is full. An ``error`` or ``abort`` ending is raised, never yielded. ``player`` is
        a fresh one for replies that are sent while they are made.
        """
        ticket.engine_id = ticket.engine_id or f"{ticket.client_id}-{secrets.token_hex(4)}"
        source = self._generate(self._host.ready_engine(), prompt, params, ticket, player)
        return self._admitted(source, ticket)

    async def first(self, outputs: AsyncGenerator[SpeechOutput]) -> SpeechOutput:
        """The first of ``outputs`` that holds audio; they are closed when there is none.

        Raises:
            OverloadedError: the server is full, or the time is up.
        """
        try:
            async for output in outputs:
                if output.audio.size:
                    return output
                if output.finish_reason is not None:
                    raise _no_audio(output.finish_reason)
        except HiggsAudioError:
            await outputs.aclose()
            raise
        raise _no_audio(FinishReason.ERROR)

    async def cancel(self, request_id: str, owner: str) -> int:
        """End every open request of that id and owner; returns how many there were."""
        engine = self._host.ready_engine()
        tickets = self.admission.cancel(request_id, owner)
        for ticket in tickets:
            await engine.abort(ticket.engine_id)
        return len(tickets)

    async def _admitted(
        self, outputs: AsyncGenerator[SpeechOutput], ticket: Ticket
    ) -> AsyncGenerator[SpeechOutput]:
        """The engine's outputs, between entering and leaving."""
        self.admission.enter(ticket)
        has_audio = has_succeeded = was_refused = False
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    self.admission.start(ticket)
                    has_audio = has_audio or output.audio.size > 0
                    has_succeeded = has_audio and _is_success(output)
                    yield output
        except InvalidRequestError:
            was_refused = True
            raise
        finally:
            if was_refused:
                self.admission.withdraw(ticket)
            else:
                self.admission.leave(ticket, succeeded=has_succeeded)

    async def _generate(
        self,
        engine: EngineClient,
        prompt: SpeechPrompt,
        params: SamplingParams,
        ticket: Ticket,
        player: VirtualPlayer | None,
    ) -> AsyncGenerator[SpeechOutput]:
        """The engine's outputs; counts how the request ended and lets none end in silence."""
        failure: FinishReason | None = FinishReason.ERROR
        last: SpeechOutput | None = None
        ticket.record.begin(prompt)
        try:
            source = engine.generate(
                prompt,
                params,
                ticket.engine_id,
                timeout_s=ticket.seconds_left,
                priority=ticket.priority,
                player=player,
            )
            async with aclosing(source):
                async for output in source:
                    ticket.record.add(output)
                    _raise_if_ended(output, ticket)
                    last = output if output.finished else None
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
            if player is not None:
                player.leave(time.monotonic())
                self._metrics.observe_player(player)


def _is_success(output: SpeechOutput) -> bool:
    return output.finished and output.finish_reason is not FinishReason.DEADLINE


def _raise_if_ended(output: SpeechOutput, ticket: Ticket) -> None:
    if ticket.is_cancelled:
        raise RequestAbortedError("the request was cancelled")
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
