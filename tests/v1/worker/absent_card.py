"""What the engine asks of a CUDA card, asked of one that is not there.

Two programs, since they change torch for their whole process; what they find is printed as JSON.

    absent_card.py launches          engines of the published width, whose kernels are only noted
    absent_card.py codes FOLDER      an engine over a small model, whose kernels are interpreted

For ``launches`` tensors on the card have shapes and no values: they are torch's on "meta", so that
whoever asks for a value fails. For ``codes`` they are the CPU's and deny it. In both, streams,
events and graphs do nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import threading
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

if sys.argv[1:2] == ["codes"]:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu import compile_ahead, random_engine
from benchmarks.gpu.suite import FULL
from benchmarks.invariance import make_requests
from vllm.checkpoints import make_model
from vllm.config import EngineConfig
from vllm.model_executor.models import higgs_audio
from vllm.v1.engine import core as core_module
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker import cuda_graphs, device_decoder
from vllm.v1.worker import worker as worker_module

CARD = torch.device("cuda", 0)
NUM_BYTES = 140 << 30

# Options of all engines, so that few sizes are recorded, and beside them those of each.
FEW_SIZES = {"max_num_seqs": 256, "max_num_batched_tokens": 128, "max_model_len": 1024}
ENGINES: dict[str, dict[str, Any]] = {
    "default": {"decodes_audio": True},
    "eager": {"enforce_eager": True},
    "not invariant": {"batch_invariant": False},
    "dependent launch": {"dependent_launch": "on"},
    "prefetch": {"dependent_launch": "prefetch"},
    "fp8 weights": {"quantization": "fp8"},
    "fp8": random_engine.FP8_OPTIONS,
}


class Asked:
    """What the card was asked for."""

    def __init__(self) -> None:
        self.is_recording = False
        self.num_graphs = 0
        self.held: list[str] = []  # what a step did that no graph can hold
        self.kernels: dict[Any, str] = {}  # key -> name

    def note(self, what: str) -> None:
        if self.is_recording:
            self.held.append(what)

    def build(self, function: JITFunction, key: str, *_: Any) -> None:
        """In the place of ``JITFunction._do_compile``; that it returns None keeps it from running."""
        name = function.__name__
        if (name, key) not in self.kernels:
            self.kernels[name, key] = name
            self.note(f"{name} is built")


class OnCard(TorchFunctionMode):
    """Lets tensors of ``place`` say that they are on the card, and makes what is asked for there."""

    def __init__(self, place: str, asked: Asked) -> None:
        super().__init__()
        self._place = torch.device(place)
        self._asked = asked

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            device = func(*args)
            return CARD if device == self._place else device
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return self._is_there(args[0])
        if func is torch.device:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "pin_memory" or kwargs.pop("pin_memory", False):
            self._asked.note("memory is pinned")
            if name == "pin_memory":
                return args[0].clone()
        target = kwargs.get("device", next((each for each in args if _is_device(each)), None))
        if name == "cpu" or (name == "to" and target is not None):
            self._asked.note("a copy leaves or reaches the card")
            return self._copied(func, args, kwargs, "cpu" if name == "cpu" else target)
        if name == "copy_" and args[1].is_meta and not args[0].is_meta:
            self._asked.note("a copy leaves the card")
            return args[0]
        return func(*map(self._placed, args), **{n: self._placed(v) for n, v in kwargs.items()})

    def _copied(self, func: Any, args: Any, kwargs: Any, target: Any) -> torch.Tensor:
        """A copy in every case: what is on a card is not what was on the host."""
        source = args[0]
        if source.is_meta and torch.device(target).type == "cpu":
            return torch.zeros(source.shape, dtype=source.dtype)
        if func.__name__ == "cpu":
            copy: torch.Tensor = source.clone()
            return copy
        placed = {name: self._placed(value) for name, value in kwargs.items()}
        copy = func(*map(self._placed, args), **placed | {"copy": True})
        return copy

    def _is_there(self, tensor: torch.Tensor) -> bool:
        return tensor.is_meta == (self._place.type == "meta")

    def _placed(self, value: Any) -> Any:
        return self._place if _is_device(value) and torch.device(value).type == "cuda" else value


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value in ("cpu", "cuda"))


class Nothing:
    """A stream, an event or a graph."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@contextlib.contextmanager
def card(place: str) -> Iterator[Asked]:
    """Torch as where there is an H200, until the end."""
    asked = Asked()

    @contextlib.contextmanager
    def record(*_: Any, **__: Any) -> Iterator[None]:
        asked.is_recording = True
        asked.num_graphs += 1
        yield
        asked.is_recording = False

    replaced = {
        "is_available": lambda: True,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: types.SimpleNamespace(total_memory=NUM_BYTES),
        "mem_get_info": lambda *_: (NUM_BYTES, NUM_BYTES),
        "memory_stats": lambda *_: defaultdict(int),
        "is_bf16_supported": lambda *_: True,
        "synchronize": lambda *_: asked.note("the host waits for the card"),
        "empty_cache": lambda: asked.note("memory is given back"),
        "current_stream": Nothing,
        "graph_pool_handle": Nothing,
        "stream": lambda _: contextlib.nullcontext(),
        "graph": record,
        **dict.fromkeys(("Stream", "Event", "CUDAGraph"), Nothing),
    }
    run = threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        with OnCard(place, asked):
            run(thread)

    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_there))
        stack.enter_context(OnCard(place, asked))
        yield asked


class Driver:
    """Triton's, for a card of compute capability 9.0."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def launches() -> dict[str, Any]:
    """Start engines; what they do while they record, and which kernels were not built ahead."""
    with card("meta") as asked, tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as at:
        driver.set_active(Driver())
        replaced: list[tuple[Any, str, Any]] = [
            # A function, which becomes a method.
            (JITFunction, "_do_compile", lambda *arguments: asked.build(*arguments)),
            (random_engine, "random_tensors", _shapes),
            (higgs_audio, "_address", lambda tensor: tensor.untyped_storage()._cdata),
            (device_decoder._ResultRing, "copy", _ended),
        ]
        for owner, attribute, value in replaced:
            at.enter_context(mock.patch.object(owner, attribute, value))
        suite = compile_ahead._suite(Path(name), FULL, CARD)
        take = {"step": compile_ahead._step, "case": compile_ahead._cases}
        for task in compile_ahead.tasks(is_quick=False):
            with torch.inference_mode():
                take.get(task.kind, compile_ahead._codec)(suite, task)
        num_ahead = len(asked.kernels)
        graphs: dict[str, int] = {}
        for name, options in ENGINES.items():
            before = asked.num_graphs
            with random_engine.open_core(suite, **{"decodes_audio": False} | FEW_SIZES | options):
                graphs[name] = asked.num_graphs - before
        return {
            "graphs": graphs,
            "held": asked.held,
            "ahead": Counter([*asked.kernels.values()][:num_ahead]),
            "late": [*asked.kernels.values()][num_ahead:],
        }


def _shapes(config: Any, **_: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in make_model._tensor_shapes(config).items():
        yield name, torch.empty(shape, device="meta")


def _ended(_: Any, num_rows: int) -> Callable[[], Any]:
    """Results of rows that are all at their limit: no values tell."""
    return lambda: (np.zeros((num_rows, 8), np.int16), np.full(num_rows, 2, np.uint8))


def codes(folder: Path) -> dict[str, list[str]]:
    """Delayed codes of some requests by an engine on the CPU and by one on the card, in hex."""
    options: dict[str, Any] = {
        **{"model": str(folder / "lm"), "audio_tokenizer_type": str(folder / "codec")},
        **{"dtype": "float32", "max_model_len": 64, "max_num_seqs": 2, "cpu_threads": 1},
        **{"kv_cache_memory": 1 << 20, "max_num_batched_tokens": 32, "codec_kernels": "torch"},
        "clip_cache_dir": str(folder / "clips"),
    }
    requests = [each for each in make_requests(12, seed=3) if len(each.prompt_token_ids) < 4 * 50]
    requests = [type(each)(**vars(each) | {"frame_limit": 12}) for each in requests[:4]]
    expected = _spoken(EngineCore(EngineConfig.from_options(**options, device="cpu")), requests)
    _correct_interpreter()
    with (
        card("cpu"),
        mock.patch.object(worker_module, "CudaGraphs", return_value=cuda_graphs.NoGraphs()),
        mock.patch.object(core_module, "_WARM_UP_FRAMES", 3),
    ):
        core = EngineCore(EngineConfig.from_options(**options, device="cuda"))
        decoder = core._executor._worker._runner._decoder  # type: ignore[attr-defined]
        assert decoder._fused_step is not None
        spoken = _spoken(core, requests)
    return {name: [expected[name].hex(), spoken[name].hex()] for name in expected}


def _spoken(core: EngineCore, requests: Any) -> dict[str, bytes]:
    spoken = {each.request_id: b"" for each in requests}
    for request in requests:
        core.add_request(request)
    while core.has_work():
        for output in core.step().outputs:
            assert output.error is None, output.error
            spoken[output.request_id] += output.delayed_codes
    core.check_integrity()
    core.shutdown()
    return spoken


def _correct_interpreter() -> None:
    """What ``tests/kernels/triton`` corrects in Triton's."""
    from triton.runtime import interpreter

    path = Path(__file__).parents[2] / "kernels/triton/conftest.py"
    spec = importlib.util.spec_from_file_location("corrections", path)
    assert spec is not None
    assert spec.loader is not None
    corrections = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(corrections)
    interpreter._convert_float = corrections._convert_float
    interpreter._patch_lang_tensor = corrections._patch_lang_tensor
    builder = interpreter.InterpreterBuilder
    for name in ("create_dot", "binary_op", "create_si_to_fp"):
        setattr(builder, name, getattr(corrections, f"_{name}"))


if __name__ == "__main__":
    found = launches() if sys.argv[1] == "launches" else codes(Path(sys.argv[2]))
    print(json.dumps(found))
