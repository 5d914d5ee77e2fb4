"""``deploy/llama-swap.yaml``: its commands are ours, and a server lives through the protocol."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from vllm.entrypoints.cli_args import parse_serve_args

DEFAULT_UNLOAD_TIMEOUT_S = 10.0
POLL_S = 0.25
SMALL_MODEL = "higgs-audio-tiny"


@pytest.fixture(scope="module")
def configuration(repo_root: Path) -> dict[str, Any]:
    text = (repo_root / "deploy" / "llama-swap.yaml").read_text(encoding="utf-8")
    configuration: dict[str, Any] = yaml.safe_load(text)
    return configuration


def words_of(model: dict[str, Any], port: int) -> list[str]:
    """The command as llama-swap runs it: without a shell."""
    return shlex.split(model["cmd"].replace("${PORT}", str(port)))


def test_commands_are_understood(configuration: dict[str, Any]) -> None:
    for model in configuration["models"].values():
        program, command, *flags = words_of(model, 5800)
        assert (program, command) == ("vllm", "serve")
        assert parse_serve_args(flags).server.port == 5800


def test_every_name_that_llama_swap_may_send_is_served(configuration: dict[str, Any]) -> None:
    for name, model in configuration["models"].items():
        served = parse_serve_args(words_of(model, 5800)[2:]).model_names
        assert {name, *model.get("aliases", [])} <= set(served)


def test_there_is_time_to_stop(configuration: dict[str, Any]) -> None:
    for model in configuration["models"].values():
        limit_s = model.get("unloadTimeout", DEFAULT_UNLOAD_TIMEOUT_S)
        assert parse_serve_args(words_of(model, 5800)[2:]).server.shutdown_timeout < limit_s


class Manager:
    """The part of llama-swap that starts, polls, forwards to and stops one model."""

    def __init__(self, model: dict[str, Any], folder: Path, health_limit_s: float) -> None:
        self._model = model
        self._folder = folder
        self._health_limit_s = health_limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client()

    def start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.client.close()
        self.client = httpx.Client(base_url=f"http://localhost:{port}", timeout=60)
        self._process = subprocess.Popen(
            words_of(self._model, port),
            env={
                **os.environ,
                "PATH": f"{self._folder}:{os.environ['PATH']}",
                "VLLM_CACHE_ROOT": str(self._folder / "cache"),
            },
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + self._health_limit_s
        while self._health() != 200:
            assert self._process.poll() is None, "it did not stay in the foreground"
            assert time.monotonic() < deadline
            time.sleep(POLL_S)

    def _health(self) -> int | None:
        try:
            return self.client.get(self._model["checkEndpoint"]).status_code
        except httpx.TransportError:
            return None

    def group(self) -> list[psutil.Process]:
        """Live processes of the group."""
        assert self._process is not None
        members = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == self._process.pid:
                    members.append(process)
            except ProcessLookupError:
                continue
        return members

    def terminate(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGTERM)

    def wait_stopped(self) -> int:
        assert self._process is not None
        return self._process.wait(DEFAULT_UNLOAD_TIMEOUT_S)

    def close(self) -> None:
        self.client.close()
        if self._process is not None:
            for process in self.group():
                process.kill()
            self._process.wait(10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the ``vllm`` command of this environment, and the embedded model once it is made."""
    folder = tmp_path_factory.mktemp("llama-swap")
    program = folder / "vllm"
    program.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m vllm.entrypoints.cli "$@"\n', encoding="utf-8"
    )
    program.chmod(0o755)
    return folder


@pytest.fixture
def manager(configuration: dict[str, Any], folder: Path) -> Iterator[Manager]:
    manager = Manager(
        configuration["models"][SMALL_MODEL], folder, configuration["healthCheckTimeout"]
    )
    yield manager
    manager.close()


@pytest.mark.slow
def test_start_poll_speak_stop_and_start_again(manager: Manager) -> None:
    for _ in range(2):
        manager.start()
        processes = manager.group()
        assert len(processes) >= 2  # the server and its engine, one group
        body = {"model": SMALL_MODEL, "input": "Hello.", "max_tokens": 40, "seed": 1}
        reply = manager.client.post("/v1/audio/speech", json=body)
        assert reply.status_code == 200
        assert reply.content.startswith(b"\xff\xf3")
        voices = manager.client.get("/v1/audio/voices", params={"model": SMALL_MODEL})
        assert "en_woman" in [voice["id"] for voice in voices.json()["voices"]]
        manager.terminate()
        assert manager.wait_stopped() == 0
        assert not [process for process in processes if process.is_running()]
        assert not manager.group()


@pytest.mark.slow
def test_a_stop_lets_short_requests_finish_and_waits_for_no_long_one(manager: Manager) -> None:
    manager.start()
    short = {"input": "Hello.", "max_tokens": 30, "seed": 1, "response_format": "pcm"}
    long = {"input": "A long text. " * 5000, "seed": 1, "response_format": "pcm"}
    with (
        manager.client.stream("POST", "/v1/audio/speech", json=long) as endless,
        manager.client.stream("POST", "/v1/audio/speech", json=short) as reply,
    ):
        unread = endless.iter_raw()
        next(unread)
        manager.terminate()
        assert len(b"".join(reply.iter_raw())) == (30 - 8) * 1920
        assert manager.wait_stopped() == 0
        with pytest.raises(httpx.RemoteProtocolError):
            list(unread)
    assert not manager.group()
