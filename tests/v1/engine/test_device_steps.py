"""Decode steps that a device takes by itself, on a CPU: the same codes, one step later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.invariance import check_invariance, make_requests
from vllm.exceptions import EngineDeadError
from vllm.outputs import FinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.messages import EngineCoreRequest
from vllm.v1.sample.ops import topk_topp
from vllm.v1.worker import gpu_model_runner, worker

Build = Callable[..., EngineCoreRequest]


def test_codes_and_samples_are_those_of_the_host_path(
    make_core: Callable[..., EngineCore], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests(8, seed=3)
    expected = run(make_core(), *requests)
    monkeypatch.setattr(worker, "_decodes_on_device", lambda device: True)
    core = make_core()
    runner = core._executor._worker._runner  # type: ignore[attr-defined]
    assert runner._decoder.depth == 2
    monkeypatch.setattr(runner._prefiller._eager, "run_sorted", _refuse)
    results = run(core, *requests)
    for request in requests:
        name = request.request_id
        assert results.codes(name) == expected.codes(name), name
        assert results.audio(name) == expected.audio(name), name
        assert results.reasons(name) == expected.reasons(name), name


def _refuse(slices: Any, prompt: Any) -> None:
    raise AssertionError("no prompt here is larger than recorded steps")


@pytest.mark.usefixtures("device_steps")
def test_prompts_of_recorded_and_of_other_steps_give_the_same_codes(
    make_core: Callable[..., EngineCore], build_request: Build, run: Any
) -> None:
    lengths = {"a": 450, "b": 400, "c": 70, "d": 300}
    requests = [
        build_request(name, prompt_len=length, frames=12, eos_rule="reference")
        for name, length in lengths.items()
    ]
    steps: list[int] = []
    core = make_core()
    eager = core._executor._worker._runner._prefiller._eager  # type: ignore[attr-defined]
    run_sorted = eager.run_sorted

    def count(slices: Any, prompt: Any) -> None:
        steps.append(len(prompt.positions))
        run_sorted(slices, prompt)

    eager.run_sorted = count
    mixed = run(core, *requests)
    assert steps == [1024], "the first step is too large to be recorded, what is left of d is not"
    by_eager = run(make_core(enforce_eager=True), *requests)
    for name in lengths:
        assert mixed.codes(name) == by_eager.codes(name), name


@pytest.mark.usefixtures("device_steps")
def test_mixed_load_equals_solo_runs(make_core: Callable[..., EngineCore]) -> None:
    report = check_invariance(make_core, num_requests=12, max_num_seqs=8)
    assert report.is_invariant, report.changed
    assert report.num_preemptions > 0, "pages were not scarce enough to test anything"
    assert report.num_cached_positions > 0, "no prompt was shared"
    assert report.num_cancelled > 0
    assert report.largest_batch > 4


@pytest.mark.usefixtures("device_steps")
def test_a_failing_launch_ends_its_requests_only(
    make_core: Callable[..., EngineCore],
    build_request: Build,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = make_core()
    decoder = core._executor._worker._runner._decoder  # type: ignore[attr-defined]
    launch, launches = decoder.launch, []

    def fail_later(rows: Any) -> Any:
        launches.append(rows)
        if len(launches) == 3:
            raise RuntimeError("broken")
        return launch(rows)

    monkeypatch.setattr(decoder, "launch", fail_later)
    failed = run(core, build_request("a"), build_request("b"))
    assert [failed.reasons(name) for name in "ab"] == [[FinishReason.ERROR]] * 2
    good = run(core, build_request("a", frames=30))
    assert good.reasons("a") == [FinishReason.LENGTH]


@pytest.mark.usefixtures("device_steps")
def test_a_lost_device_ends_the_engine(
    make_core: Callable[..., EngineCore],
    build_request: Build,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = make_core()

    def fail(rows: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(core._executor._worker._runner._decoder, "launch", fail)  # type: ignore[attr-defined]
    monkeypatch.setattr(gpu_model_runner, "is_lost", lambda device: True)
    with pytest.raises(EngineDeadError, match="the device is lost: an illegal memory access"):
        run(core, build_request("a"))
    core.abort_requests(("a",))


class Operations(TorchDispatchMode):
    """Names of the operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.fixture
def decoding_core(
    device_steps: None, make_core: Callable[..., EngineCore], build_request: Build
) -> EngineCore:
    """In the middle of three utterances, at a step that needs no page."""
    core = make_core(block_size=64)
    for name in "abc":
        core.add_request(build_request(name, frames=200, eos_rule="reference"))
    for _ in range(8):
        core.step()
    return core


# What would make the host wait for the device, or hold a copy that a CUDA graph cannot hold.
_WAITS = tuple(
    f"aten.{name}"
    for name in (
        *("_local_scalar_dense", "item", "is_nonzero", "equal.", "nonzero", "masked_select"),
        *("_unique", "lift_fresh", "scalar_tensor", "where.Scalar", "repeat_interleave"),
    )
)


def test_a_step_is_free_of_the_host(
    decoding_core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is sorted with numpy here is sorted by torch elsewhere.
    monkeypatch.setattr(topk_topp, "_largest", lambda probs, count: probs.topk(count).values)
    decoder = decoding_core._executor._worker._runner._decoder  # type: ignore[attr-defined]
    with torch.inference_mode(), Operations() as operations:
        decoder._step(decoder._sizes.size_for(3, 100))
    assert not [name for name in operations.names if name.startswith(_WAITS)]
    assert len(operations.names) > 20


def test_a_steady_step_asks_for_one_copy_outside_the_graph(
    decoding_core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = decoding_core._executor._worker._runner  # type: ignore[attr-defined]
    monkeypatch.setattr(runner._decoder._graphs, "replay", lambda size: None)
    with Operations() as operations:
        decoding_core.step()
    # NOTE: views, and what numpy asks of a tensor before it looks at its memory.
    free = ("slice", "select", "detach", "to.dtype_layout", "resolve_conj", "resolve_neg")
    costly = [n for n in operations.names if not n.removeprefix("aten.").startswith(free)]
    assert costly == ["aten.copy_.default"], operations.names


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [False, True])
def test_a_steady_step_on_a_gpu_waits_for_nothing_and_allocates_nothing(
    make_core: Callable[..., EngineCore], build_request: Build, eager: bool
) -> None:
    core = make_core(device="cuda", block_size=64, enforce_eager=eager)
    for name in "abc":
        core.add_request(build_request(name, prompt_len=70, frames=120, eos_rule="reference"))
    for _ in range(4):
        core.step()
    runner = core._executor._worker._runner  # type: ignore[attr-defined]
    rows = runner._decode_batch.rows
    with torch.inference_mode():
        frames = [runner._decoder.launch(rows)]  # the ring's first use
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(8):
                frames.append(runner._decoder.launch(rows))
                frames.pop(0)()  # waits for an event, which is no synchronisation of the device
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if not eager:
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_mixed_load_on_a_gpu_equals_solo_runs(make_core: Callable[..., EngineCore]) -> None:
    def make_cuda_core(**options: Any) -> EngineCore:
        return make_core(device="cuda", **options)

    report = check_invariance(make_cuda_core, num_requests=32, max_num_seqs=16)
    assert report.is_invariant, report.changed
