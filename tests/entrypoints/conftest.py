"""A stand-in for the engine and a live server in front of it, so that no model is needed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import pytest
import uvicorn

from vllm.entrypoints.bosonai.api_server import build_app
from vllm.entrypoints.bosonai.engine_host import EngineHost
from vllm.entrypoints.bosonai.serving_voices import open_store
from vllm.entrypoints.bosonai.voice_store import VoiceStore
from vllm.entrypoints.cli_args import parse_serve_args
from vllm.exceptions import EngineDeadError, OverloadedError, UnknownVoiceError
from vllm.outputs import FinishReason, SpeechOutput, SpeechStats, Usage
from vllm.player import VirtualPlayer
from vllm.prompts import SpeechPrompt, Voice
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.messages import EngineInfo, EngineStats, SchedulerStats
from vllm.v1.engine.processor import Processor

SAMPLE_RATE = 24_000
HOP = 960
FRAMES_PER_CHAR = 2
FRAMES_PER_CHUNK = 4
NPM_LIMIT_S = 60
LIMIT_S = 100  # bounds a hang; no machine that works is so slow
RANDOM_SEED = 4711  # what the fake "draws" for a request without a seed


class FakeVoices:
    store_threads = None

    def __init__(self, store: VoiceStore | None, names: Sequence[str]) -> None:
        self.store = store
        self._voices = {
            name: Voice(name, name.replace("_", " ").title(), is_default=name == names[0])
            for name in names
        }
        self._aliases = {"alloy": "en_woman", "onyx": "en_man"}

    def resolve(self, voice: str | None) -> Voice:
        name = self._aliases.get(voice or "en_woman", voice or "en_woman")
        if name not in self._voices:
            known = ", ".join(self._voices)
            raise UnknownVoiceError(f"voice {voice!r} is unknown; there are {known}", param="voice")
        return self._voices[name]

    @property
    def names(self) -> list[str]:
        return [*self._voices]

    def is_preset(self, name: str) -> bool:
        return name in self._voices or name in self._aliases

    def preset_names(self) -> list[str]:
        return [*self._voices]

    def threads_for(self, *_names: str | None) -> None:
        return None

    def forget(self, voice_id: str) -> None:
        pass

    def list(self) -> list[dict[str, Any]]:
        return [
            {
                "id": v.voice_id,
                "voice_id": v.voice_id,
                "name": v.name,
                "description": v.description,
                "language": v.language,
                "labels": v.labels,
                "default": v.is_default,
                "duration": v.duration_s,
                "uploaded": False,
            }
            for v in self._voices.values()
        ]


@dataclass
class FakeEngine:
    """Sine tones: two frames for each character, pitch from the seed.

    With ``holds_at`` a request waits before the chunk of that number until ``go_on`` is set, so that
    it is open for as long as a test needs it, however fast or slow the machine is.
    """

    holds_at: int | None = None
    go_on: threading.Event = field(default_factory=threading.Event)
    start_error: Exception | None = None
    fail_before: Exception | None = None  # raised before the first audio
    fail_after: Exception | None = None  # raised after the first chunk
    finish_reason: FinishReason = FinishReason.STOP
    can_encode: bool = True
    may_start: threading.Event = field(default_factory=threading.Event)
    info: EngineInfo | None = None
    voices: FakeVoices | None = None
    store: VoiceStore | None = None
    voice_names: Sequence[str] = ("en_woman", "en_man", "de_man")
    processor: Processor | None = None  # for the routes that show prompts
    seen: list[tuple[SpeechPrompt, SamplingParams, str]] = field(default_factory=list)
    timeouts: list[float | None] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    players: list[VirtualPlayer | None] = field(default_factory=list)
    max_num_seqs: int = 16
    to_abort: set[str] = field(default_factory=set)
    aborted: list[str] = field(default_factory=list)
    is_ready: bool = False
    is_dead: bool = False
    is_silent: bool = False

    def __post_init__(self) -> None:
        self.may_start.set()
        self._open = 0

    async def start(self) -> None:
        while not self.may_start.is_set():
            await asyncio.sleep(0.005)
        if self.start_error is not None:
            raise self.start_error
        self.info = EngineInfo(
            architecture="fake",
            num_codebooks=8,
            sample_rate=SAMPLE_RATE,
            hop_length=HOP,
            can_encode=self.can_encode,
            codec_fingerprint="0",
            max_model_len=8192,
            max_num_seqs=self.max_num_seqs,
            num_kv_blocks=64,
            max_pinned_blocks=16,
            device="cpu",
            dtype="float32",
            tokenizer_folder="",
            model_folder="",
        )
        self.voices = FakeVoices(self.store, self.voice_names)
        self.is_ready = True

    def kill(self) -> None:
        self.is_dead = True
        self.is_ready = False

    async def probe(self) -> bool:
        return not self.is_silent

    async def wait_dead(self) -> None:
        while not self.is_dead:
            await asyncio.sleep(0.005)

    def engine_stats(self) -> EngineStats:
        return EngineStats(SchedulerStats(num_running=self._open, prefix_cache_hits=3))

    async def shutdown(self) -> None:
        self.is_ready = False

    async def generate(
        self,
        prompt: SpeechPrompt,
        params: SamplingParams,
        request_id: str,
        *,
        timeout_s: float | None = None,
        priority: int = 0,
        player: VirtualPlayer | None = None,
    ) -> AsyncIterator[SpeechOutput]:
        self.seen.append((prompt, params, request_id))
        self.timeouts.append(timeout_s)
        self.priorities.append(priority)
        self.players.append(player)
        if self.fail_before is not None:
            raise self.fail_before
        seed = RANDOM_SEED if params.seed is None else params.seed
        num_frames = FRAMES_PER_CHAR * len(prompt.text or "")
        if params.max_tokens is not None:
            num_frames = min(num_frames, max(0, params.max_tokens - 8))
        samples = sine(num_frames * HOP, seed)
        self._open += 1
        has_left = False
        try:
            if num_frames == 0:
                yield self._output(request_id, samples, seed, True, 0)
            for index, start in enumerate(range(0, num_frames, FRAMES_PER_CHUNK)):
                await asyncio.sleep(0)
                if index == self.holds_at:
                    await self._hold(request_id)
                if request_id in self.to_abort:
                    yield self._ending(request_id, FinishReason.ABORT)
                    return
                if self.is_dead:
                    raise EngineDeadError("the engine process is gone")
                end = min(num_frames, start + FRAMES_PER_CHUNK)
                is_last = end == num_frames
                yield self._output(request_id, samples[start * HOP : end * HOP], seed, is_last, end)
                if self.fail_after is not None:
                    raise self.fail_after
        except (asyncio.CancelledError, GeneratorExit):
            has_left = True
            raise
        finally:
            self._open -= 1
            if has_left:
                self.aborted.append(request_id)

    async def abort(self, request_id: str) -> None:
        self.to_abort.add(request_id)

    async def _hold(self, request_id: str) -> None:
        """Wait for ``go_on``, the request's abort or the engine's death."""
        while not (self.go_on.is_set() or self.is_dead or request_id in self.to_abort):
            await asyncio.sleep(0.005)

    def _ending(self, request_id: str, reason: FinishReason) -> SpeechOutput:
        silence = np.zeros(0, np.float32)
        return replace(self._output(request_id, silence, 0, True, 0), finish_reason=reason)

    def _output(
        self, request_id: str, audio: np.ndarray, seed: int, is_last: bool, num_frames: int
    ) -> SpeechOutput:
        ending: dict[str, Any] = {}
        if is_last:
            ending = {
                "finish_reason": self.finish_reason,
                "usage": Usage(
                    prompt_tokens=12, completion_tokens=num_frames + 8, audio_tokens=num_frames
                ),
                "stats": SpeechStats(
                    audio_duration_s=num_frames * HOP / SAMPLE_RATE,
                    processing_time_s=0.5,
                    time_to_first_audio_s=0.1,
                ),
            }
        return SpeechOutput(
            request_id=request_id,
            audio=audio,
            codes=np.zeros((8, audio.size // HOP), np.int16),
            delayed_codes=np.zeros((0, 8), np.int16),
            sample_rate=SAMPLE_RATE,
            seed=seed,
            **ending,
        )


def sine(num_samples: int, seed: int) -> np.ndarray:
    times = np.arange(num_samples) / SAMPLE_RATE
    return (0.5 * np.sin(2 * np.pi * (200 + seed % 400) * times)).astype(np.float32)


@dataclass
class LiveServer:
    url: str
    engine: FakeEngine
    client: httpx.Client
    host: EngineHost
    fatal: threading.Event

    @contextlib.contextmanager
    def asking(self, body: Any, path: str = "/v1/audio/speech") -> Iterator[None]:
        """A client that has sent a request and reads nothing; it leaves at the end."""
        address = httpx.URL(self.url)
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {address.host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        with socket.create_connection((address.host, address.port or 80), LIMIT_S) as connection:
            connection.sendall(head.encode() + data)
            yield

    @staticmethod
    def wait_until(condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, "it did not come true"
            time.sleep(0.005)


@contextlib.contextmanager
def serve(engine: FakeEngine, *flags: str, wait_ready: bool = True) -> Iterator[LiveServer]:
    """A server on a free port of 127.0.0.1, in a thread of its own."""
    args = parse_serve_args(
        ["--served-model-name", "tts-test", "tts-1", "--voice-store", "none", *flags]
    )
    fatal = threading.Event()
    engine.store = open_store(args.server)
    host = EngineHost(lambda: engine, on_fatal=fatal.set)
    app = build_app(args, host)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            port=0,
            log_level="critical",
            timeout_graceful_shutdown=1,
            root_path=args.server.root_path,
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        thread.join(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=LIMIT_S) as client:
        try:
            if wait_ready:
                while client.get("/health").status_code != 200:
                    thread.join(0.005)
            yield LiveServer(url, engine, client, host, fatal)
        finally:
            for waited_for in (engine.may_start, engine.go_on):
                waited_for.set()
            server.should_exit = True
            thread.join(LIMIT_S)
            assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with serve(FakeEngine()) as server:
        yield server


@pytest.fixture
def start_server() -> Iterator[Callable[..., LiveServer]]:
    """Start servers with an engine and flags of one's own; they stop with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda engine=None, *flags, **options: stack.enter_context(
            serve(engine or FakeEngine(), *flags, **options)
        )


S3_SERVER = """
import threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

application, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()


def one_at_a_time(environ, start_response):  # moto's conditional writes are not atomic
    with lock:
        return application(environ, start_response)


server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True)
print(server.port, flush=True)
server.serve_forever()
"""


class S3Server:
    """An S3 server, a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", S3_SERVER],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        with self._process.stdout as output:
            self.url = f"http://127.0.0.1:{int(output.readline())}"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(LIMIT_S)


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """Address of the S3 server that the tests share."""
    server = S3Server()
    yield server.url
    server.stop()


@pytest.fixture
def start_s3() -> Iterator[Callable[[], S3Server]]:
    """Start S3 servers of one's own; they stop with the test."""
    with contextlib.ExitStack() as stack:

        def start() -> S3Server:
            server = S3Server()
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment that leads boto3, here and in processes started here, to that server."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    # A starved server is no dead one.
    monkeypatch.setattr("vllm.entrypoints.bosonai.voice_bucket._CONFIG.read_timeout", LIMIT_S)


@pytest.fixture
def bucket(s3: None) -> str:
    """Name of an empty bucket."""
    name = f"voices-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name


@pytest.fixture
def fake_engine() -> type[FakeEngine]:
    return FakeEngine


class BusyAtFirst(FakeEngine):
    """Refuses its first request and serves the others."""

    async def generate(
        self, prompt: SpeechPrompt, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[SpeechOutput]:
        is_first = not self.seen
        async for output in super().generate(prompt, params, request_id, **options):
            if is_first:
                raise OverloadedError("busy", retry_after_s=1.0)
            yield output


@pytest.fixture
def busy_at_first() -> BusyAtFirst:
    return BusyAtFirst()


@pytest.fixture(scope="session")
def installed_javascript(repo_root: Path, request: pytest.FixtureRequest) -> Path:
    """Folder with the JavaScript example and its package, installed once per checkout."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = Path(request.config.cache.mkdir("javascript-example"))
    source = repo_root / "examples" / "javascript"
    lock = (source / "package-lock.json").read_text(encoding="utf-8")
    stamp = folder / ".installed"
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_*"))
    if stamp.exists() and stamp.read_text(encoding="utf-8") == lock:
        return folder
    command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    try:
        subprocess.run(command, cwd=folder, capture_output=True, timeout=NPM_LIMIT_S, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"npm could not fetch the openai package: {error}")
    stamp.write_text(lock, encoding="utf-8")
    return folder
