"""From a checked prompt to the engine's outputs: admission, first audio, counting, clean ends.

Every route that speaks goes through here, so that limits and figures hold over all of them. Knows
neither request bodies nor audio formats.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

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
    from vllm.entrypoints.cli_args import ServerConfig
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
        self._config = config
        self._host = host
        self._metrics = metrics
        self._num_waiting = 0

    def ready_engine(self) -> EngineClient:
        """The engine; raises OverloadedError while it loads and EngineDeadError when it is gone."""
        return self._host.ready_engine()

    def outputs(
        self, prompt: SpeechPrompt, params: SamplingParams, request_id: str
    ) -> AsyncGenerator[SpeechOutput]:
        """Outputs of one request, to be closed by whoever takes them; see ``AsyncLLM.generate``.

        An ``error`` or ``abort`` ending is raised, never yielded.
        """
        return self._generate(self._host.ready_engine(), prompt, params, request_id)

    async def first(self, outputs: AsyncIterator[SpeechOutput]) -> SpeechOutput:
        """The first of ``outputs`` that holds audio.

        Raises:
            OverloadedError: too many requests wait for theirs.
        """
        limit = self._config.max_waiting_requests
        if limit and self._num_waiting >= limit:
            raise OverloadedError(f"{limit} requests are waiting already")
        self._num_waiting += 1
        try:
            async for output in outputs:
                if output.audio.size:
                    return output
                if output.finish_reason is not None:
                    raise _no_audio(output.finish_reason)
        finally:
            self._num_waiting -= 1
        raise _no_audio(FinishReason.ERROR)

    async def _generate(
        self, engine: EngineClient, prompt: SpeechPrompt, params: SamplingParams, request_id: str
    ) -> AsyncGenerator[SpeechOutput]:
        """The engine's outputs; counts how the request ended and lets none end in silence."""
        timeout_s = self._config.request_timeout or None
        failure: FinishReason | None = FinishReason.ERROR
        last: SpeechOutput | None = None
        try:
            source = engine.generate(prompt, params, request_id, timeout_s=timeout_s)
            async with aclosing(source):
                async for output in source:
                    last = output if output.finished else None
                    _raise_if_failed(output)
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


def _raise_if_failed(output: SpeechOutput) -> None:
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
