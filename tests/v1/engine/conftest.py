"""A small model and codec of the real layouts, and engines over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm.checkpoints.make_codec import make_codec
from vllm.checkpoints.make_model import make_model
from vllm.config import EngineConfig
from vllm.kernels import native
from vllm.outputs import FinishReason, SpeechOutput
from vllm.prompts import SpeechPrompt, Voice
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.messages import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.processor import Processor
from vllm.v1.worker import worker

# Two layers over the real vocabulary of codes; the tokenizer decides the text vocabulary.
_SIZES = {
    "model_type": "higgs_audio_v2",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_codebooks": 8,
    "codebook_size": 1026,
    "audio_stream_bos_id": 1024,
    "audio_stream_eos_id": 1025,
    "audio_token_id": 500,
    "audio_bos_token_id": 501,
    "audio_delay_token_id": 502,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """layout -> folder with ``lm`` and ``codec`` of equal weights."""
    base = tmp_path_factory.mktemp("engine")
    sizes = base / "sizes.json"
    sizes.write_text(json.dumps(_SIZES))
    for layout in ("boson", "transformers"):
        make_model(base / layout / "lm", layout=layout, size=str(sizes), seed=5)
        make_codec(base / layout / "codec", layout=layout, size="tiny", seed=5)
    return {layout: base / layout for layout in ("boson", "transformers")}


@pytest.fixture(scope="session")
def checkpoint(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["transformers"]


@pytest.fixture
def device_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes decode steps as on a device, those that a CUDA graph would hold, though on a CPU."""
    monkeypatch.setattr(worker, "_decodes_on_device", lambda device: True)


@pytest.fixture(params=["native", "torch"])
def decode_path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test once with native decode steps and once with torch's."""
    if request.param == "torch":
        with native.disabled():
            yield
        return
    if native.loaded_library() is None:
        pytest.skip("the native library is not built")
    yield


@pytest.fixture
def make_core(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., EngineCore]]:
    """Starts engine cores with the given options; all are shut down and checked at the end."""
    cores: list[EngineCore] = []

    def make(**options: Any) -> EngineCore:
        defaults: dict[str, Any] = {
            "model": str(checkpoint / "lm"),
            "audio_tokenizer_type": str(checkpoint / "codec"),
            "device": "cpu",
            "cpu_threads": 1,
            "max_num_seqs": 16,
            "max_model_len": 512,
            "clip_cache_dir": str(tmp_path / "clips"),
        }
        core = EngineCore(EngineConfig.from_options(**defaults | options))
        cores.append(core)
        return core

    yield make
    for core in cores:
        core.check_integrity()
        core.shutdown()


class NoVoice:
    """A voice source with one voice that is nothing but a scene."""

    def resolve(self, voice: str | None) -> Voice:
        return Voice("plain", "Plain")


class Driver:
    """Runs texts through a core by way of processor and tasks, as the clients do."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.processor = Processor(core._config, core.info, NoVoice())

    def speak(self, prompt: SpeechPrompt, params: SamplingParams) -> list[SpeechOutput]:
        task = self.processor.process("r", prompt, params)
        self.core.add_request(task.next_request())
        items: list[SpeechOutput] = []
        while task.finish_reason is None:
            for output in self.core.step().outputs:
                items.append(task.absorb(output))
                if output.finish_reason is not None and task.finish_reason is None:
                    self.core.add_request(task.next_request())
        return items


@pytest.fixture
def make_driver(make_core: Callable[..., EngineCore]) -> Callable[..., Driver]:
    return lambda **options: Driver(make_core(**options))


def core_request(
    request_id: str,
    *,
    prompt_len: int = 20,
    frames: int = 40,
    seed: int = 0,
    first_id: int = 10,
    **params: Any,
) -> EngineCoreRequest:
    """A request over plain text ids; ``first_id`` tells prompts apart."""
    ids = (first_id + np.arange(prompt_len)) % 250
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=ids.astype(np.int32).tobytes(),
        sampling_params=SamplingParams(**params),
        seed=seed,
        frame_limit=frames,
        limit_reason=FinishReason.LENGTH,
    )


@pytest.fixture(scope="session")
def build_request() -> Callable[..., EngineCoreRequest]:
    return core_request


class Recorder:
    """Collects what a core says of each request."""

    def __init__(self) -> None:
        self.parts: dict[str, list[EngineCoreOutput]] = {}

    def take(self, outputs: tuple[EngineCoreOutput, ...]) -> None:
        for output in outputs:
            self.parts.setdefault(output.request_id, []).append(output)

    def codes(self, request_id: str) -> bytes:
        return b"".join(part.delayed_codes for part in self.parts[request_id])

    def audio(self, request_id: str) -> bytes:
        return b"".join(part.audio for part in self.parts[request_id])

    def reasons(self, request_id: str) -> list[FinishReason]:
        parts = self.parts.get(request_id, [])
        return [part.finish_reason for part in parts if part.finish_reason is not None]


@pytest.fixture
def run() -> Callable[..., Recorder]:
    """Adds requests to a core and steps until nothing is left."""

    def run_all(core: EngineCore, *requests: EngineCoreRequest) -> Recorder:
        recorder = Recorder()
        for request in requests:
            core.add_request(request)
        while core.has_work():
            recorder.take(core.step().outputs)
        return recorder

    return run_all


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
