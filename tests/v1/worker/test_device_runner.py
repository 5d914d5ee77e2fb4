"""The runner on a device that is not the host, as far as that can be told without one.

Tensors have a device and a shape but no memory here, so whatever mixes the host's with the
device's, or asks for a value, raises.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks._engine import NullCodecRunner
from vllm.checkpoints.make_model import _template
from vllm.kernels import philox
from vllm.kernels.cache import allocate_kv_caches
from vllm.model_executor.models.higgs_audio import HiggsAudioModel
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched_output import NewRequestData, PrefillChunk, SchedulerOutput, StepKind
from vllm.v1.worker.cuda_graphs import NoGraphs
from vllm.v1.worker.decoder import RowOwners
from vllm.v1.worker.device_decoder import DeviceDecoder
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.model_state import CodebookModelState

BLOCK_SIZE, NUM_BLOCKS, MAX_NUM_SEQS = 16, 20, 4
DEVICE = torch.device("meta")


@pytest.fixture
def runner() -> Iterator[GPUModelRunner]:
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

        def make_decoder(owners: RowOwners) -> DeviceDecoder:
            return DeviceDecoder(owners, device=DEVICE, graphs=NoGraphs(), batch_invariant=True)

        runner = GPUModelRunner(
            model,
            CodebookModelState(model, MAX_NUM_SEQS + 1, DEVICE),
            NullCodecRunner(),  # type: ignore[arg-type]
            caches,
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


def request(name: str, num_prompt: int, num_audio: int) -> NewRequestData:
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


def test_prefill_and_a_launch_keep_to_the_device(runner: GPUModelRunner) -> None:
    prefill = SchedulerOutput(
        StepKind.PREFILL,
        new=(request("a", 40, 12), request("b", 9, 0)),
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
    plan = SchedulerOutput(StepKind.IDLE, new=(request("a", 40, 0),), new_blocks={"a": (1, 2, 3)})
    runner.execute_model(plan)
    runner.execute_model(SchedulerOutput(StepKind.IDLE, finished=frozenset("a")))
    runner.check_integrity()
    assert not runner._requests
