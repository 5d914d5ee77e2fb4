"""The real server with a real engine behind a socket: a small random checkpoint on the CPU."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import HiggsAudioV2ForConditionalGeneration

from vllm.checkpoints import run_make
from vllm.entrypoints.bosonai.voices import VoiceLibrary
from vllm.model_executor.framing import DelayPattern
from vllm.prompts.higgs_audio import HiggsAudioPromptBuilder

LIMIT_S = 200  # bounds a hang
CHECKPOINT_SEED = 1
BYTES_PER_FRAME = 2 * 960
REQUEST = {"input": "Hello, this is a test.", "seed": 42, "max_tokens": 60}
# Minutes of work for any machine, so that none is done before a test has acted. The context of these
# servers is long and their audio unlimited: either would end an endless text early.
ENDLESS_REQUEST = {"input": "A long text. " * 7000, "seed": 1, "response_format": "pcm"}


class RealServer:
    """A server process; its log is read along, so that it never blocks."""

    def __init__(self, folder: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "vllm.entrypoints.bosonai.api_server"]
        model = ["--model", str(folder / "lm"), "--audio-tokenizer-type", str(folder / "codec")]
        place = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", "0"]
        size = ["--max-num-seqs", "16", "--max-model-len", "8192", "--cpu-threads", "1"]
        size += ["--max-audio-seconds", "0"]
        self.process = subprocess.Popen(
            [*command, *model, *place, *size, *flags],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CACHE_ROOT": str(folder / "cache")},
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self._port()}", timeout=LIMIT_S)

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(iter(self.process.stderr.readline, ""))

    def _port(self) -> int:
        return int(self._wait(lambda: re.search(r"listening on \S+:(\d+)", "".join(self.log)))[1])

    def _wait(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            has_ended = self.process.poll() is not None
            if has_ended:
                self._reader.join(LIMIT_S)  # it may have said so before it ended
            found = condition()
            if found:
                return found
            assert not has_ended, "".join(self.log)
            time.sleep(0.05)
        raise AssertionError("".join(self.log))

    def wait_ready(self) -> RealServer:
        self._wait(lambda: self._health() == 200)
        return self

    def _health(self) -> int | None:
        try:
            return self.client.get("/health").status_code
        except httpx.TransportError:
            return None  # bound, not yet accepting

    def wait_ended(self) -> int:
        status = self.process.wait(LIMIT_S)
        self._reader.join(LIMIT_S)
        return status

    def engine_processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def pcm(self, **fields: Any) -> bytes:
        body = {**REQUEST, "response_format": "pcm", **fields}
        reply = self.client.post("/v1/audio/speech", json=body)
        assert reply.status_code == 200, reply.text
        return reply.content

    def chat(self, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """The audio of a chat's answer, in the fields of ``pcm``."""
        options = {"seed": 42, "max_tokens": 60, "audio": {"format": "pcm16"}, **fields}
        body = {"messages": messages, **options}
        reply = self.client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        audio: dict[str, Any] = reply.json()["choices"][0]["message"]["audio"]
        return audio

    def metrics(self) -> dict[str, float]:
        """Every counter and every histogram's sum and count, over all labels but ``le``."""
        values: dict[str, float] = {}
        page = self.client.get("/metrics").text
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name.endswith(("_total", "_sum", "_count")):
                    name = sample.name.removeprefix("vllm:")
                    values[name] = values.get(name, 0) + sample.value
        return values

    def close(self) -> None:
        self.client.close()
        for process in [*self.engine_processes(), self.process] if self._is_alive() else []:
            process.kill()
        self.process.wait(LIMIT_S)
        self._reader.join(LIMIT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _is_alive(self) -> bool:
        return self.process.poll() is None


def wav_of(pcm: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(24_000)
        out.writeframes(pcm)
    return file.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    run_make(folder, layout="boson", size="tiny", seed=CHECKPOINT_SEED)
    return folder


@pytest.fixture
def start_real(checkpoint: Path) -> Iterator[Callable[..., RealServer]]:
    servers: list[RealServer] = []

    def start(*flags: str) -> RealServer:
        servers.append(RealServer(checkpoint, *flags))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[RealServer]:
    server = RealServer(checkpoint)
    try:
        yield server.wait_ready()
    finally:
        server.close()


def test_the_same_seed_gives_the_same_bytes_alone_and_among_sixteen(server: RealServer) -> None:
    alone = server.pcm()
    assert len(alone) > 2 * 960
    bodies = [{"seed": 100 + i, "input": f"Another text, number {i}."} for i in range(15)]
    bodies.insert(7, {})
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda body: server.pcm(**body), bodies))
    assert together[7] == alone
    assert len(set(together)) == 16
    assert server.pcm(stream=False) == alone


@pytest.mark.parametrize("name", ["mp3", "opus", "aac", "flac", "wav"])
def test_equal_requests_give_equal_files(server: RealServer, name: str) -> None:
    assert server.pcm(response_format=name) == server.pcm(response_format=name)


def test_usage_of_a_complete_file(server: RealServer) -> None:
    body = {**REQUEST, "response_format": "pcm", "stream": False}
    reply = server.client.post("/v1/audio/speech", json=body)
    audio_tokens = int(reply.headers["x-usage-audio-tokens"])
    assert len(reply.content) == audio_tokens * 960 * 2
    assert int(reply.headers["x-usage-completion-tokens"]) <= 60
    assert reply.headers["x-seed"] == "42"
    assert float(reply.headers["x-realtime-factor"]) > 0


def test_a_chat_speaks_as_the_speech_route_does(server: RealServer) -> None:
    question = {"role": "user", "content": REQUEST["input"]}
    audio = server.chat(question)
    assert base64.b64decode(audio["data"]) == server.pcm()
    clip = base64.b64encode(wav_of(server.pcm(seed=2))).decode()
    part = {"type": "input_audio", "input_audio": {"data": clip, "format": "wav"}}
    reference = [{"role": "user", "content": "Good day."}, {"role": "assistant", "content": [part]}]
    cloned = base64.b64decode(server.chat(*reference, question)["data"])
    assert cloned == server.pcm(ref_audio=clip, ref_text="Good day.")
    follow_up = server.chat(question, {"role": "assistant", "audio": audio}, question)
    assert base64.b64decode(follow_up["data"]) not in (cloned, server.pcm())


def test_the_engine_never_sees_what_only_text_can_honour(server: RealServer) -> None:
    question = {"role": "user", "content": REQUEST["input"]}
    before = server.chat(question)["data"]
    for name, value in {
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "logit_bias": {"5": 100},
        "logprobs": True,
        "min_tokens": 9,
        "bad_words": ["test"],
        "allowed_token_ids": [1],
    }.items():
        body = {"messages": [question], name: value}
        reply = server.client.post("/v1/chat/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)
    assert server.chat(question)["data"] == before


def test_voices_and_aliases(server: RealServer) -> None:
    voices = server.client.get("/v1/audio/voices").json()["voices"]
    ids = {voice["id"] for voice in voices}
    assert {"en_man", "en_woman", "de_man", "de_woman", "zh_man", "zh_woman"} <= ids
    assert server.pcm(voice="alloy")
    reply = server.client.post("/v1/audio/speech", json={**REQUEST, "voice": "nobody"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "voice")


def metric(server: RealServer, name: str) -> float:
    page = server.client.get("/metrics").text
    found = re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", page, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def test_an_upload_speaks_the_same_after_a_restart_and_until_it_is_deleted(
    start_real: Callable[..., RealServer], bucket: str
) -> None:
    place = ("--voice-store", f"s3://{bucket}/tts")
    first = start_real(*place).wait_ready()
    tone = (9000 * np.sin(np.arange(48_000) / 20)).astype("<i2").tobytes()
    form = {"name": "Anna", "transcript": "Two seconds of a tone."}
    files = {"audio_sample": ("anna.wav", wav_of(tone), "audio/wav")}
    num_frames = 50
    uploaded = first.client.post("/v1/audio/voices", data=form, files=files)
    assert uploaded.status_code == 200, uploaded.text
    first._wait(lambda: metric(first, "gpu_prefix_cache_queries_total"))
    first._wait(lambda: not metric(first, "num_requests_running"))
    assert metric(first, "gpu_prefix_cache_hits_total") == 0
    before = first.pcm(voice="Anna")
    assert metric(first, "gpu_prefix_cache_hits_total") >= num_frames
    assert before != first.pcm()
    first.process.send_signal(signal.SIGTERM)
    assert first.wait_ended() == 0

    second = start_real(*place, "--pinned-voices", "Anna").wait_ready()
    assert metric(second, "num_pinned_blocks") >= num_frames // 16
    assert metric(second, "gpu_prefix_cache_hits_total") == 0
    assert second.pcm(voice="Anna") == before
    assert metric(second, "gpu_prefix_cache_hits_total") >= num_frames
    endless = {**ENDLESS_REQUEST, "voice": "Anna"}

    def read(pieces: Iterator[bytes], spoken: bytes = b"") -> bytes:
        while len(spoken) < 800 * BYTES_PER_FRAME:
            spoken += next(pieces)
        return spoken[: 800 * BYTES_PER_FRAME]

    with second.client.stream("POST", "/v1/audio/speech", json=endless) as reply:
        undisturbed = read(reply.iter_raw())
    second._wait(lambda: second.client.get("/load").json() == {"server_load": 0})
    with second.client.stream("POST", "/v1/audio/speech", json=endless) as reply:
        pieces = reply.iter_raw()
        spoken = next(pieces)
        assert second.client.delete("/v1/audio/voices/Anna").status_code == 200
        assert second.client.get("/load").json() == {"server_load": 1}
        refused = second.client.post("/v1/audio/speech", json={**REQUEST, "voice": "Anna"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "voice")
        assert "'Anna' is unknown" in refused.json()["error"]["message"]
        assert read(pieces, spoken) == undisturbed


def test_a_client_that_leaves_frees_its_place(server: RealServer) -> None:
    with server.client.stream("POST", "/v1/audio/speech", json=ENDLESS_REQUEST) as reply:
        pieces = reply.iter_raw()
        next(pieces)
        assert server.client.get("/load").json() == {"server_load": 1}
    server._wait(lambda: server.client.get("/load").json() == {"server_load": 0})
    server._wait(lambda: not metric(server, "num_requests_running"))
    assert server.pcm()


def test_metrics_of_requests_at_once_add_up(server: RealServer) -> None:
    """Every total is what the replies say of themselves."""

    def clip(seed: int) -> dict[str, Any]:
        tone = np.sin(np.arange(24_000) / (5 + seed)) * 8000
        encoded = base64.b64encode(wav_of(tone.astype("<i2").tobytes())).decode()
        return {"ref_audio": encoded, "ref_text": "A tone."}

    bodies = [
        {"stream": False},
        {"stream": False, "max_tokens": 33, "seed": 1},
        {"stream": False, "input": "Something else.", **clip(1)},
        {"stream_format": "sse", "input": "A text for events."},
        {"stream_format": "sse", "speed": 2.0, **clip(1)},
        {"stream_format": "sse", "max_tokens": 100, **clip(2)},
    ]

    def speak(fields: dict[str, Any]) -> dict[str, int]:
        body = {**REQUEST, "response_format": "pcm", **fields}
        reply = server.client.post("/v1/audio/speech", json=body)
        assert reply.status_code == 200, reply.text
        if "stream_format" in fields:
            usage: dict[str, int] = json.loads(reply.text.rsplit("data: ", 1)[1])["usage"]
            return usage
        names = ("prompt_tokens", "completion_tokens", "audio_tokens")
        return {name: int(reply.headers[f"x-usage-{name.replace('_', '-')}"]) for name in names}

    before = server.metrics()
    with ThreadPoolExecutor(len(bodies)) as pool:
        usages = list(pool.map(speak, bodies))
    after = server.metrics()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    num = len(bodies)
    prompt, completion, audio = (
        sum(usage[name] for usage in usages)
        for name in ("prompt_tokens", "completion_tokens", "audio_tokens")
    )

    assert grown["request_success_total"] == num
    assert grown["prompt_tokens_total"] == grown["request_prompt_tokens_sum"] == prompt
    assert grown["generation_tokens_total"] == grown["request_generation_tokens_sum"] == completion
    assert grown["audio_seconds_total"] == pytest.approx(audio / 25)
    for name in ("e2e_request_latency", "time_to_first_audio", "request_queue_time"):
        assert grown[f"{name}_seconds_count"] == num
    # Every position was computed once, but for those found in the cache and the BOS frames.
    assert grown["gpu_prefix_cache_queries_total"] == prompt
    cached = grown["gpu_prefix_cache_hits_total"]
    assert grown["iteration_tokens_total_sum"] == prompt - cached + completion - num
    assert grown["num_preemptions_total"] == 0
    # Windows of 4, 8, 16, 25, 25 ... frames.
    ends = (0, 4, 12, 28, 53, 78, 103)
    num_windows = sum(end < usage["audio_tokens"] for usage in usages for end in ends)
    assert grown["codec_windows_total"] == num_windows
    assert grown["codec_decode_seconds_total"] > 0
    # Preset voices bring a clip as well, so that every request asks for one.
    assert grown["clip_cache_queries_total"] == num
    assert grown["codec_clips_total"] == num - grown["clip_cache_hits_total"] >= 2
    assert grown["player_streams_total"] == 3
    assert grown["player_underruns_total"] == grown["player_stall_seconds_count"]


def test_the_log_says_where_requests_are_served(server: RealServer) -> None:
    url = str(server.client.base_url).rstrip("/")
    server._wait(lambda: any(f"Uvicorn running on {url} " in line for line in server.log))
    log = "".join(server.log)
    assert log.count(f"running on {url} ") == 1
    assert log.index(": ready\n") < log.index(f"running on {url} ")


def test_the_http_process_is_light(server: RealServer) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert psutil.Process(server.process.pid).memory_info().rss < 200 * 2**20


def test_a_reply_from_memory_is_the_reply_that_was_made(
    server: RealServer, start_real: Callable[..., RealServer]
) -> None:
    caching = start_real("--response-cache", "4M").wait_ready()
    for fields in (
        {"response_format": "mp3", "voice": "en_man"},
        {"response_format": "wav", "stream": False, "speed": 1.3},
    ):
        body = {**REQUEST, "max_tokens": 30, **fields}
        made, hit = (caching.client.post("/v1/audio/speech", json=body) for _ in range(2))
        assert [reply.headers["x-cache"] for reply in (made, hit)] == ["miss", "hit"]
        fresh = server.client.post("/v1/audio/speech", json=body)
        assert "x-cache" not in fresh.headers
        assert hit.content == made.content == fresh.content
        assert len(hit.content) > 1000
    shown = caching.client.post("/tokenize", json=body).json()
    assert str(shown["count"]) == hit.headers["x-usage-prompt-tokens"]


def test_the_engines_death_ends_streams_and_server(start_real: Callable[..., RealServer]) -> None:
    server = start_real().wait_ready()
    with server.client.stream("POST", "/v1/audio/speech", json=ENDLESS_REQUEST) as reply:
        pieces = reply.iter_raw()
        next(pieces)
        for process in server.engine_processes():
            process.send_signal(signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            list(pieces)
    assert server._health() in (503, None)
    assert server.wait_ended() == 1


def test_sigterm_ends_everything_cleanly(start_real: Callable[..., RealServer]) -> None:
    server = start_real("--shutdown-timeout", "1").wait_ready()
    engines = server.engine_processes()
    assert engines
    with server.client.stream("POST", "/v1/audio/speech", json=ENDLESS_REQUEST) as reply:
        pieces = reply.iter_raw()
        next(pieces)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.RemoteProtocolError):
            list(pieces)
    assert server.wait_ended() == 0
    assert not psutil.wait_procs(engines, timeout=LIMIT_S)[1]


def test_sigterm_while_loading(start_real: Callable[..., RealServer]) -> None:
    server = start_real()
    server._wait(server._health)  # 503, as long as a test that polls is not slower than the load
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_ended() == 0


def test_a_new_engine_takes_over_where_asked(start_real: Callable[..., RealServer]) -> None:
    server = start_real("--restart-engine").wait_ready()
    before = server.pcm()
    killed = server.engine_processes()
    for process in killed:
        process.send_signal(signal.SIGKILL)
    server._wait(lambda: set(server.engine_processes()) - set(killed))
    server.wait_ready()
    assert server.pcm() == before


def test_a_model_that_is_not_there(start_real: Callable[..., RealServer], tmp_path: Path) -> None:
    server = start_real("--model", str(tmp_path / "nothing"))
    assert server.wait_ended() == 1
    assert "nothing" in "".join(server.log)
    assert "Traceback" not in "".join(server.log)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "vllm.entrypoints.bosonai.api_server"]
        ended = subprocess.run(
            [*command, "--host", "127.0.0.1", "--port", port],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    assert ended.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_pcm_equals_generate_and_the_reference_codec(
    server: RealServer, tmp_path: Path, reference_codec_class: Any
) -> None:
    """The whole path against transformers: one prompt with a cloned voice, greedy, 60 frames."""
    pcm = server.pcm(
        voice="en_man", temperature=0, ras_window_length=0, eos_rule="reference", normalize=False
    )
    # The same weights in the layout that transformers loads.
    run_make(tmp_path, layout="transformers", size="tiny", seed=CHECKPOINT_SEED)
    codec = reference_codec_class.from_pretrained(tmp_path / "codec").eval()
    voices = VoiceLibrary(
        sample_rate=24_000, hop_length=960, codec_fingerprint="", num_codebooks=8, can_encode=True
    )
    voice = voices.resolve("en_man")
    assert voice.clip is not None
    assert voice.clip.samples is not None
    with torch.inference_mode():
        clip_codes = codec.encode(torch.from_numpy(voice.clip.samples)[None, None]).audio_codes[0]
    pattern = DelayPattern(8, 1024, 1025)
    clip_frames = torch.from_numpy(pattern.apply(clip_codes.numpy()).astype(np.int64))
    builder = HiggsAudioPromptBuilder.from_folder(tmp_path / "lm", tmp_path / "lm")
    built = builder.build(REQUEST["input"], voice, normalize=False)

    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path / "lm").float().eval()
    for name in ("ras_win_len", "ras_win_max_num_repeat"):
        if hasattr(model.generation_config, name):
            delattr(model.generation_config, name)
    with torch.inference_mode():
        frames = model.generate(
            input_ids=torch.from_numpy(built.token_ids.astype(np.int64))[None],
            attention_mask=torch.ones(1, built.num_positions, dtype=torch.long),
            audio_input_ids=clip_frames[None],
            audio_input_ids_mask=torch.ones(1, len(clip_frames), dtype=torch.bool),
            max_new_tokens=REQUEST["max_tokens"],
            do_sample=False,
        )[0, len(clip_frames) :]
        codes = torch.from_numpy(pattern.undo(frames.numpy(), ended=False).astype(np.int64))
        audio = codec.decode(codes[None]).audio_values[0, 0].numpy()
    expected = np.rint(audio.clip(-1, 1) * 32767)
    ours = np.frombuffer(pcm, "<i2")
    assert ours.size == 52 * 960
    assert np.abs(ours - expected).max() <= 1


def test_a_signal_ends_an_event_stream_with_an_error_event(
    start_real: Callable[..., RealServer],
) -> None:
    server = start_real("--shutdown-timeout", "1").wait_ready()
    body = {**ENDLESS_REQUEST, "stream_format": "sse"}
    events: list[str] = []
    with server.client.stream("POST", "/v1/audio/speech", json=body) as reply:
        for line in reply.iter_lines():
            if line.startswith("event:"):
                if not events:
                    server.process.send_signal(signal.SIGTERM)
                events.append(line)
    assert events[0] == "event: speech.audio.delta"
    assert events[-1] == "event: speech.audio.error"
    assert server.wait_ended() == 0
