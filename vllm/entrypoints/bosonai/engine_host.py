"""Keeps the server's engine: starts it, says whether it can be used, reacts to its death.

What an engine does with a request is its own business; what the process does when the engine
cannot be had any more is decided by whoever made the host.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from vllm.exceptions import EngineDeadError, HiggsAudioError, OverloadedError
from vllm.logger import get_logger

if TYPE_CHECKING:
    from vllm.entrypoints.bosonai.voices import VoiceLibrary
    from vllm.outputs import SpeechOutput
    from vllm.player import VirtualPlayer
    from vllm.prompts import SpeechPrompt
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.messages import EngineInfo, EngineStats
    from vllm.v1.engine.processor import Processor

__all__ = ["EngineClient", "EngineHost", "HostState"]

logger = get_logger(__name__)

_RESTART_PAUSE_S = 1.0
_SHUTDOWN_LIMIT_S = 4.0


class EngineClient(Protocol):
    """What the server needs of an engine; ``AsyncLLM`` is the real one."""

    @property
    def info(self) -> EngineInfo | None: ...

    @property
    def voices(self) -> VoiceLibrary | None: ...

    @property
    def processor(self) -> Processor | None: ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def is_dead(self) -> bool: ...

    async def start(self) -> None: ...

    def generate(
        self,
        prompt: SpeechPrompt,
        params: SamplingParams,
        request_id: str,
        *,
        timeout_s: float | None = None,
        priority: int = 0,
        player: VirtualPlayer | None = None,
    ) -> AsyncGenerator[SpeechOutput]: ...

    async def abort(self, request_id: str) -> None: ...

    async def probe(self) -> bool: ...

    async def wait_dead(self) -> None: ...

    def engine_stats(self) -> EngineStats: ...

    async def shutdown(self) -> None: ...


class HostState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DEAD = "dead"


class EngineHost:
    """One engine at a time.

    Args:
        create: makes an engine that has not been started.
        restart: start a new engine when one dies.
        prepare: called with an engine that has started; it is ready when that is done.
        on_ready: called whenever requests can be served from now on.
        on_fatal: called once when there will be no engine any more.
    """

    def __init__(
        self,
        create: Callable[[], EngineClient],
        *,
        restart: bool = False,
        prepare: Callable[[EngineClient], Awaitable[None]] | None = None,
        on_ready: Callable[[], None] | None = None,
        on_fatal: Callable[[], None] | None = None,
    ) -> None:
        self._create = create
        self._restart = restart
        self._prepare = prepare
        self._is_prepared = prepare is None
        self._on_ready = on_ready
        self._on_fatal = on_fatal
        self._engine = create()
        self._has_failed = False
        self._is_closing = False

    @property
    def engine(self) -> EngineClient:
        return self._engine

    @property
    def state(self) -> HostState:
        if self._has_failed or self._engine.is_dead:
            return HostState.LOADING if self._will_restart else HostState.DEAD
        is_ready = self._engine.is_ready and self._is_prepared
        return HostState.READY if is_ready else HostState.LOADING

    @property
    def _will_restart(self) -> bool:
        return self._restart and not self._has_failed and not self._is_closing

    def ready_engine(self) -> EngineClient:
        """The engine, for one request.

        Raises:
            OverloadedError: it is still loading.
            EngineDeadError: it is gone.
        """
        if self.state is HostState.DEAD:
            raise EngineDeadError("the engine is gone; restart the server")
        if self.state is HostState.LOADING:
            raise OverloadedError("the model is still loading", retry_after_s=2.0)
        return self._engine

    async def run(self) -> None:
        """Start the engine and stay with it until there is none any more, or ``close``."""
        try:
            await self._keep_running()
        except Exception as error:
            if not self._is_closing:
                is_surprise = not isinstance(error, HiggsAudioError)
                logger.error("the engine could not be started: %s", error, exc_info=is_surprise)
        if self._is_closing:
            return
        self._has_failed = True
        if self._on_fatal is not None:
            self._on_fatal()

    async def _keep_running(self) -> None:
        """Returns when the engine has died and no other takes its place."""
        while not self._is_closing:
            await self._engine.start()
            if self._prepare is not None:
                await self._prepare(self._engine)
                self._is_prepared = True
            logger.info("ready")
            if self._on_ready is not None:
                self._on_ready()
            await self._engine.wait_dead()
            if self._is_closing:
                return
            logger.error("the engine process died")
            if not self._restart:
                return
            await self._engine.shutdown()
            await asyncio.sleep(_RESTART_PAUSE_S)
            if not self._is_closing:
                self._is_prepared = self._prepare is None
                self._engine = self._create()
                logger.info("starting a new engine process")

    async def close(self) -> None:
        """Stop the engine for good; open requests end with an error."""
        self._is_closing = True
        try:
            async with asyncio.timeout(_SHUTDOWN_LIMIT_S):
                await self._engine.shutdown()
        except TimeoutError:
            logger.error("the engine did not stop within %g s", _SHUTDOWN_LIMIT_S)
