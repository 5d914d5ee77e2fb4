"""The engine process: a core behind a socket. Started by ``IpcClient``, never by hand.

Reads its configuration from standard input, which stays open as a lifeline: when it closes, the
parent is gone and this process ends.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from typing import Final

import zmq

from vllm.exceptions import HiggsAudioError
from vllm.logger import configure_logging, get_logger
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.ipc import decode_command, decode_config, encode_outputs
from vllm.v1.engine.messages import EngineCoreCommand, EngineCoreOutputs, EngineStats

__all__ = ["main"]

logger = get_logger(__name__)

_STATS_INTERVAL_S: Final = 0.25  # between messages that carry nothing but figures


class _Connection:
    """The socket to the client."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)

    def send(self, outputs: EngineCoreOutputs) -> None:
        self._socket.send(encode_outputs(outputs), copy=False)

    def receive(self, *, wait: bool) -> list[EngineCoreCommand]:
        """All commands that have come; waits for the first when ``wait`` is set."""
        commands = []
        flags = 0 if wait else zmq.NOBLOCK
        while True:
            try:
                commands.append(decode_command(self._socket.recv(flags)))
            except zmq.Again:
                return commands
            flags = zmq.NOBLOCK

    def close(self) -> None:
        self._socket.close(linger=1000)


def main(address: str) -> int:
    """Serve one client until it says so or is gone; returns the exit status."""
    configure_logging()
    # The manager signals the whole process group; when to end is the parent's decision.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = decode_config(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, name="lifeline", daemon=True).start()
    connection = _Connection(address)
    try:
        core = EngineCore(config)
        # What start-up made lives as long as the process; no collection need look at it again.
        gc.collect()
        gc.freeze()
        connection.send(EngineCoreOutputs(info=core.info))
        _run(core, connection)
    except Exception as error:  # the process edge: say why, then die
        is_surprise = not isinstance(error, HiggsAudioError)
        logger.error("the engine process ends: %s", error, exc_info=is_surprise)
        connection.send(EngineCoreOutputs(failure=f"{type(error).__name__}: {error}"))
        return 1
    finally:
        connection.close()
    core.shutdown()
    return 0


def _run(core: EngineCore, connection: _Connection) -> None:
    """Take commands, step, send; until the client ends it."""
    last_stats, last_sent = EngineStats(), 0.0
    while True:
        for command in connection.receive(wait=not core.has_work()):
            if command.shutdown:
                return
            for request in command.add:
                core.add_request(request)
            core.abort_requests(command.abort, command.abort_reason)
            if command.probe:
                connection.send(EngineCoreOutputs(stats=last_stats))
        if not core.has_work():
            continue
        outputs = core.step()
        now = time.monotonic()
        is_news = outputs.stats != last_stats and (
            now - last_sent > _STATS_INTERVAL_S or not core.has_work()
        )
        if outputs.outputs or is_news:
            connection.send(outputs)
            last_stats, last_sent = outputs.stats, now


def _end_with_parent() -> None:
    """Wait for the end of standard input, which only the parent's death or will brings."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
