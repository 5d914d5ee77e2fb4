"""How an API side talks to an engine core: in its own process, or in another one.

Both clients speak the same messages; which requests there are and what they mean is not their
business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from vllm.config import EngineConfig
from vllm.exceptions import ConfigError, EngineDeadError
from vllm.logger import get_logger
from vllm.outputs import FinishReason
from vllm.v1.engine.messages import (
    EngineCoreCommand,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineInfo,
)

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

__all__ = ["InprocClient", "IpcClient"]

logger = get_logger(__name__)

# Less than what the server waits for its engine, or one that hangs would outlive it, card and all.
_EXIT_TIMEOUT_S = 3.0


class InprocClient:
    """The core in this process; every ``get_outputs`` runs one step."""

    def __init__(self, config: EngineConfig) -> None:
        from vllm.v1.engine.core import EngineCore

        self._core: EngineCore = EngineCore(config)

    @property
    def info(self) -> EngineInfo:
        return self._core.info

    def add_request(self, request: EngineCoreRequest) -> None:
        self._core.add_request(request)

    def abort_requests(
        self, request_ids: tuple[str, ...], reason: FinishReason = FinishReason.ABORT
    ) -> None:
        self._core.abort_requests(request_ids, reason)

    def get_outputs(self) -> EngineCoreOutputs:
        return self._core.step()

    def check_integrity(self) -> None:
        """Assert that the core's books agree."""
        self._core.check_integrity()

    def shutdown(self) -> None:
        self._core.shutdown()


class IpcClient:
    """The core in a process of its own, behind a socket. Loads no torch.

    ``start``, then ``add_request`` and ``abort_requests`` at will and ``get_outputs`` from one
    task. When the process dies, ``get_outputs`` raises ``EngineDeadError``.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[str] | None = None
        self._folder: str | None = None
        self._socket: Any = None
        self._died = asyncio.Event()
        self._is_ready = False
        self._is_ending = False  # by our will
        self._watcher: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the engine, while there is one."""
        return None if self._process is None else self._process.pid

    async def start(self) -> EngineInfo:
        """Start the process and wait until it is warm.

        Raises:
            ConfigError: the engine says that it cannot start, and why.
            EngineDeadError: it died without a word.
        """
        import zmq
        import zmq.asyncio

        from vllm.v1.engine.ipc import encode_config

        self._folder = tempfile.mkdtemp(prefix="vllm-engine-")
        address = f"ipc://{self._folder}/engine"
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm.v1.engine.core_process", address],
            stdin=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(encode_config(self._config) + "\n")
        self._process.stdin.flush()
        self._watcher = asyncio.create_task(self._watch(self._process))
        outputs = await self.get_outputs()
        if outputs.info is None:
            raise ConfigError(outputs.failure or "the engine sent no information about itself")
        self._is_ready = True
        return outputs.info

    async def add_request(self, request: EngineCoreRequest) -> None:
        await self._send(EngineCoreCommand(add=(request,)))

    async def abort_requests(
        self, request_ids: tuple[str, ...], reason: FinishReason = FinishReason.ABORT
    ) -> None:
        await self._send(EngineCoreCommand(abort=request_ids, abort_reason=reason))

    async def probe(self) -> None:
        """Ask for a message, which comes between two steps."""
        await self._send(EngineCoreCommand(probe=True))

    async def get_outputs(self) -> EngineCoreOutputs:
        """The next message of the engine.

        Raises:
            EngineDeadError: the process is gone and all of its messages have been read.
        """
        from vllm.v1.engine.ipc import decode_outputs

        receive = asyncio.ensure_future(self._socket.recv())
        died = asyncio.ensure_future(self._died.wait())
        try:
            await asyncio.wait({receive, died}, return_when=asyncio.FIRST_COMPLETED)
            if not receive.done():  # what it said last may still be on its way
                await asyncio.wait({receive}, timeout=0.2)
            if receive.done():
                return decode_outputs(receive.result())
        finally:
            for future in (receive, died):
                future.cancel()
        raise EngineDeadError("the engine process has died")

    async def wait_dead(self) -> None:
        """Return when the process is gone."""
        await self._died.wait()

    async def shutdown(self) -> None:
        """End the process: asked first, killed if it does not go. May be called again."""
        self._is_ending = True
        if self._process is not None and self._process.poll() is None:
            if self._is_ready:
                with contextlib.suppress(EngineDeadError):
                    await self._send(EngineCoreCommand(shutdown=True))
            else:  # it reads no messages while it loads, but it notices a closed lifeline
                assert self._process.stdin is not None
                self._process.stdin.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._died.wait(), _EXIT_TIMEOUT_S)
            if self._process.poll() is None:
                logger.warning("the engine process does not end; killing it")
                self._process.kill()
                await self._died.wait()
        if self._watcher is not None:
            await self._watcher
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        if self._socket is not None:
            self._socket.close(linger=0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _send(self, command: EngineCoreCommand) -> None:
        import zmq

        from vllm.v1.engine.ipc import encode_command

        if self._died.is_set() or self._socket is None:
            raise EngineDeadError("the engine process has died")
        try:
            # NOTE: without the flag this would wait for ever for a peer that has gone.
            await self._socket.send(encode_command(command), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise EngineDeadError(f"the engine process cannot be reached: {error}") from error

    async def _watch(self, process: subprocess.Popen[str]) -> None:
        """Notice the end of the process, without a thread where the system allows it."""
        if hasattr(os, "pidfd_open"):
            await _wait_for_exit(process.pid)
        status = await asyncio.to_thread(process.wait)
        level = logging.INFO if self._is_ending else logging.ERROR
        logger.log(level, "the engine process ended with status %d", status)
        self._died.set()


async def _wait_for_exit(pid: int) -> None:
    loop = asyncio.get_running_loop()
    handle = os.pidfd_open(pid)
    exited = loop.create_future()

    def mark() -> None:
        loop.remove_reader(handle)
        if not exited.done():
            exited.set_result(None)

    loop.add_reader(handle, mark)
    try:
        await exited
    finally:
        loop.remove_reader(handle)
        os.close(handle)
