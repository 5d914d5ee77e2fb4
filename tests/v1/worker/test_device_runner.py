"""The runner on a device that is not the host, as far as that can be told without one.

Tensors have a device and a shape but no memory here, so whatever mixes the host's with the
device's, or asks for a value, raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks._engine import NullCodecRunner
from vllm.checkpoints.make_model import _template
from vllm.kernels import attention, philox
from vllm.kernels.cache import allocate_kv_caches
from vllm.model_executor.models import higgs_audio
from vllm.model_executor.models.higgs_audio import HiggsAudioModel
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched_output import NewRequestData, PrefillChunk, SchedulerOutput, StepKind
from vllm.v1.worker.cuda_graphs import NoGraphs
from vllm.v1.worker.decoder import RowOwners
from vllm.v1.worker.device_decoder import DeviceDecoder
from vllm.v1.worker.device_prefill import RecordedPrefill
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.model_state import CodebookModelState
from vllm.v1.worker.prefill import EagerPrefill, Prefiller

BLOCK_SIZE, NUM_BLOCKS, MAX_NUM_SEQS = 16, 20, 4
DEVICE = torch.device("meta")
NUM_HEADS = _template("tiny").num_attention_heads


@contextmanager
def fake_runner(*, records_prefill: bool) -> Iterator[GPUModelRunner]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        with DEVICE:
            model = HiggsAudioModel(_template("tiny"), dtype=torch.bfloat16, max_model_len=128)
        spec = model.spec
        caches = allocate_kv_caches(
            spec.num_layers,
            NUM_BLOCKS + 1,
            BLOCK_SIZE,
            spec.num_kv_heads,
            spec.head_dim,
            dtype=spec.dtype,
            device=DEVICE,
        )

        def make_prefiller(owners: RowOwners) -> Prefiller:
            eager = EagerPrefill(owners, DEVICE)
            if not records_prefill:
                return eager
            return RecordedPrefill(
                owners, eager, device=DEVICE, graphs=NoGraphs(), max_num_tokens=128
            )

        def make_decoder(owners: RowOwners) -> DeviceDecoder:
            return DeviceDecoder(owners, device=DEVICE, graphs=NoGraphs(), batch_invariant=True)

        runner = GPUModelRunner(
            model,
            CodebookModelState(model, MAX_NUM_SEQS + 1, DEVICE),
            NullCodecRunner(),  # type: ignore[arg-type]
            caches,
            make_prefiller=make_prefiller,
            make_decoder=make_decoder,
            has_mirrors=True,
            block_size=BLOCK_SIZE,
            max_num_seqs=MAX_NUM_SEQS,
            device=DEVICE,
        )
        runner._clears_blocks = False  # as where kernels attend
        runner.warm_up()
        yield runner
    for cached in (philox._grid, philox._round_constants):
        cached.cache_clear()


@pytest.fixture
def runner() -> Iterator[GPUModelRunner]:
    with fake_runner(records_prefill=False) as runner:
        yield runner


@pytest.fixture
def recording_runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[GPUModelRunner]:
    """With kernels that do nothing, where torch's stand-ins for them would ask for values."""

    def attend(qkv: Tensor, cos: Tensor, *args: Any, **options: Any) -> Tensor:
        return qkv.new_empty(len(qkv), NUM_HEADS * cos.shape[-1])

    monkeypatch.setattr(attention, "_is_fused", lambda cache: True)
    monkeypatch.setattr(attention, "rope_write_kv", lambda *args: None)
    monkeypatch.setattr(attention, "rope_attend", attend)
    monkeypatch.setattr(attention, "rope_write_attend", attend)
    monkeypatch.setattr(higgs_audio, "can_fuse", lambda device, **sizes: True)
    with fake_runner(records_prefill=True) as runner:
        yield runner


def new_request(name: str, num_prompt: int, num_audio: int) -> NewRequestData:
    return NewRequestData(
        request_id=name,
        prompt_token_ids=np.full(num_prompt, 50, np.int32),
        prompt_frames=np.zeros((num_audio, 8), np.int16),
        audio_positions=np.arange(3, 3 + num_audio),
        sampling_params=SamplingParams(),
        seed=1,
        frame_limit=40,
        max_silence_frames=None,
        num_cached_positions=0,
    )


@pytest.mark.parametrize("kind", ["runner", "recording_runner"])
def test_prefill_and_a_launch_keep_to_the_device(kind: str, request: pytest.FixtureRequest) -> None:
    runner = request.getfixturevalue(kind)
    prefill = SchedulerOutput(
        StepKind.PREFILL,
        new=(new_request("a", 40, 12), new_request("b", 9, 0)),
        new_blocks={"a": (3, 5, 0), "b": (7,)},
        prefill=(PrefillChunk("a", 0, 40, True), PrefillChunk("b", 0, 9, True)),
    )
    assert not runner.execute_model(prefill).errors
    step = SchedulerOutput(StepKind.DECODE, decode=("a", "b"), new_blocks={"a": (9,)})
    output = runner.execute_model(step)
    assert not output.errors
    assert output.frames is None, "nothing waits for the first step"
    assert len(runner._in_flight) == 1


def test_rows_come_and_go_on_the_device(runner: GPUModelRunner) -> None:
    plan = SchedulerOutput(
        StepKind.IDLE, new=(new_request("a", 40, 0),), new_blocks={"a": (1, 2, 3)}
    )
    runner.execute_model(plan)
    runner.execute_model(SchedulerOutput(StepKind.IDLE, finished=frozenset("a")))
    runner.check_integrity()
    assert not runner._requests
