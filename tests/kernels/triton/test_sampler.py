"""The Triton sampler against the torch one and ``CodebookState``: draws, ties, streams, the end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from vllm.kernels.philox import Purpose, uniform
from vllm.kernels.sampler import DeviceSampler
from vllm.kernels.triton.offline import ARCHITECTURES
from vllm.kernels.triton.sampler import _uniform
from vllm.model_executor.framing import DelayPattern
from vllm.model_executor.heads import CodebookState
from vllm.sampling_params import SamplingParams
from vllm.v1.sample import RowSettings, Sampler, SamplingMetadata

DEFAULT = SamplingParams()
GREEDY = SamplingParams(temperature=0.0)


class Rows:
    """Equal streams twice: one for the torch sampler, one for the kernel."""

    def __init__(
        self, params, device, *, num_codebooks=2, codebook_size=24, frame_limit=None, num_past=0
    ):
        """``num_past``: frames of arbitrary codes that every stream already has."""
        num_rows = len(params)
        self.num_rows, self.size, self.device = num_rows, codebook_size, device
        self.pattern = DelayPattern(num_codebooks, codebook_size - 2, codebook_size - 1)
        self.settings = RowSettings(num_rows)
        self.torch_state = CodebookState(self.pattern, num_rows)
        self.state = CodebookState(self.pattern, num_rows, device)
        every = torch.arange(num_rows)
        past = torch.randint(3, (num_past, num_rows, num_codebooks))
        for row, each in enumerate(params):
            self.settings.set_row(row, each, 2**64 - 1 - row * 0x123456789)
        for state in (self.torch_state, self.state):
            rows = every.to(state.last_frame.device)
            for row, each in enumerate(params):
                state.add_row(row, eos_rule=each.eos_rule, frame_limit=frame_limit)
            state.start(rows)
            for frames in past:
                state.advance(rows, frames.to(rows.device))
        self.positions = torch.arange(100, 100 + num_rows, device=device)
        self.sampler = DeviceSampler(self.state.memory, self.positions)
        self.sampler.start_rows(np.arange(num_rows), self.settings.memory)

    def logits(self, num_rows=None, scale=2.0):
        shape = (num_rows or self.num_rows, self.pattern.num_codebooks, self.size)
        return torch.randn(shape) * scale

    def torch_step(self, logits, rows):
        metadata = SamplingMetadata.of_rows(rows, self.settings, self.size, torch.device("cpu"))
        width = metadata.history_width
        history = self.torch_state.recent(metadata.rows, width) if width else None
        next_frame = self.torch_state.next_frame(metadata.rows)
        frames = Sampler(self.pattern)(logits.float().clone(), metadata, next_frame, history)
        status = self.torch_state.advance(metadata.rows, frames)
        return torch.cat([frames, status[:, None]], dim=1)

    def step(self, logits, rows):
        index = torch.tensor(rows, dtype=torch.int32, device=self.device)
        shape = (len(rows), self.pattern.num_codebooks + 1)
        results = torch.full(shape, 99, dtype=torch.int16, device=self.device)
        self.sampler(logits.to(self.device), index, results)
        return results.cpu().long()

    def assert_equal_states(self):
        ours, theirs = self.state.memory, self.torch_state.memory
        assert torch.equal(ours.counters.cpu(), theirs.counters)
        assert torch.equal(ours.history.cpu(), theirs.history)
        assert torch.equal(ours.last_frame.cpu(), theirs.last_frame)


def random_params(generator):
    return SamplingParams(
        temperature=generator.choice([0.0, 0.3, 1.0, 1.7]),
        top_k=int(generator.choice([-1, 1, 2, 5, 50, 2**31 - 1])),
        top_p=generator.choice([1e-6, 0.3, 0.8, 0.95, 1.0]),
        ras_window_length=int(generator.choice([0, 3, 7, 64])),
        ras_max_num_repeat=int(generator.choice([0, 1, 2])),
        ras_mode=str(generator.choice(["redraw", "block"])),
        eos_rule=str(generator.choice(["strict", "reference"])),
    )


@pytest.mark.parametrize(
    "seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 12))]
)
def test_equals_the_torch_sampler(device, seed):
    """Random settings; draws on the border between two codes are the exception, see below."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    params = [random_params(generator) for _ in range(4)]
    rows = Rows(params, device, num_past=9)
    order = torch.randperm(len(params)).tolist()
    for scale in (0.5, 3.0):
        logits = rows.logits(scale=scale)
        assert torch.equal(rows.step(logits, order), rows.torch_step(logits, order)), params
        rows.assert_equal_states()
    assert rows.positions.tolist() == [102, 103, 104, 105]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_of_full_width_equal_the_torch_sampler(device, dtype):
    """Sums of 1,026 weights round in another order than torch's, so one draw of many may differ."""
    torch.manual_seed(0)
    rows = Rows([DEFAULT], device, num_codebooks=4, codebook_size=1026, num_past=9)
    logits = rows.logits().to(dtype)
    differing = rows.step(logits, [0]) != rows.torch_step(logits, [0])
    assert differing.sum() <= 1


def test_equally_likely_codes_stay_together(device):
    """Ties at the k-th code and at the last of top-p are kept, as torch keeps them."""
    off = {"ras_window_length": 0}
    params = [SamplingParams(top_k=2, **off), SamplingParams(top_k=-1, top_p=0.5, **off)]
    rows = Rows(params, device, num_codebooks=1, codebook_size=20)
    logits = torch.tensor([1.0, 4.0, 4.0, 4.0, *[0.0] * 16]).expand(2, 1, 20).contiguous()
    for _ in range(8):
        assert torch.equal(rows.step(logits, [0, 1]), rows.torch_step(logits, [0, 1]))
    for history in rows.state.memory.history[:, :, 0].cpu():
        assert set(history.unique().tolist()) == {-1, 1, 2, 3}


@pytest.mark.parametrize("rule", ["strict", "reference"])
def test_end_of_speech_runs_down_the_staircase_and_stops_there(device, grid_order, rule):
    rows = Rows([SamplingParams(temperature=0.0, eos_rule=rule)], device, num_codebooks=3)
    statuses = []
    for step in range(9):
        logits = rows.logits()
        logits[0, :, rows.pattern.eos] = -100.0
        logits[0, 0, rows.pattern.eos] = 100.0 if step == 4 else -100.0
        ours = rows.step(logits, [0])
        if statuses and statuses[-1] != 0:
            assert ours.tolist() == [[-1] * 4]  # idle
            break
        assert torch.equal(ours, rows.torch_step(logits, [0]))
        statuses.append(int(ours[0, -1]))
    assert statuses[-1] == 1
    rows.assert_equal_states()
    assert rows.positions.tolist() == [-1]


def test_idle_rows_and_padding_change_nothing(device):
    rows = Rows([GREEDY, GREEDY, GREEDY], device, frame_limit=12, num_past=10)
    at_start = rows.state.save_row(1)
    logits = rows.logits(4)
    assert rows.step(logits[:1], [1])[0, -1] == 2  # the limit
    before = rows.state.save_row(1)
    results = rows.step(logits, [1, 0, -1, 2])
    assert results[[0, 2]].tolist() == [[-1, -1, -1]] * 2
    assert results[[1, 3], -1].tolist() == [2, 2]
    after = rows.state.save_row(1)
    assert torch.equal(after.counters, before.counters)
    assert torch.equal(after.history, before.history)

    rows.state.restore_row(1, at_start)
    rows.sampler.start_rows(np.array([1]), rows.settings.memory)
    assert rows.step(logits, [0, 1, 2, -1])[:, -1].tolist() == [-1, 2, -1, -1]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's arithmetic is numpy's
def test_logits_that_are_no_numbers_still_give_codes(device):
    rows = Rows([DEFAULT, GREEDY], device, num_codebooks=1, num_past=3)
    for value in (math.nan, math.inf, -math.inf):
        results = rows.step(torch.full((2, 1, rows.size), value), [0, 1])
        assert ((results[:, :-1] >= 0) & (results[:, :-1] < rows.size)).all()


@triton.jit
def _numbers(settings_ptr, frames_ptr, numbers_ptr, PURPOSE: tl.constexpr):
    row, codebook = tl.program_id(0), tl.program_id(1)
    number = _uniform(settings_ptr + row * 8, tl.load(frames_ptr + row), codebook, PURPOSE)
    tl.store(numbers_ptr + row * tl.num_programs(1) + codebook, number)


@pytest.mark.parametrize("purpose", list(Purpose))
def test_noise_equals_philox_to_the_bit(device, purpose):
    seeds = np.array([0, 1, 2**31, 2**32 - 1, 2**63 + 5, 2**64 - 1], np.uint64)
    frames = torch.tensor([0, 7, 2**31 - 1, 2**31, 2**32 - 1, 3])
    settings = np.zeros((6, 8), np.int32)
    settings[:, 6:] = seeds.view(np.int32).reshape(6, 2)
    numbers = torch.empty(6, 3, device=device)
    _numbers[(6, 3)](
        torch.from_numpy(settings).to(device), frames.to(device), numbers, PURPOSE=int(purpose)
    )
    expected = uniform(torch.from_numpy(seeds.view(np.int64)), frames, 3, [purpose])[0]
    assert torch.equal(numbers.cpu(), expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("logits", ["*fp32", pytest.param("*bf16", marks=pytest.mark.slow)])
def test_compiles_without_spills(compile_offline, arch, logits):
    compiled = compile_offline(
        "vllm.kernels.triton.sampler:sample_frames_kernel",
        {
            "logits_ptr": logits,
            **dict.fromkeys(("rows_ptr", "settings_ptr", "arrivals_ptr"), "*i32"),
            **dict.fromkeys(("last_frame_ptr", "counters_ptr", "positions_ptr"), "*i64"),
            **dict.fromkeys(("history_ptr", "results_ptr"), "*i16"),
        },
        {
            **{"NUM_CODEBOOKS": 8, "CODEBOOK_SIZE": 1026, "BLOCK": 2048},
            **{"BOS": 1024, "EOS": 1025, "PDL": arch >= 90},
        },
        arch,
        num_warps=4,
        launch_pdl=arch >= 90,
    )
    assert compiled.faults() == []
    assert compiled.num_registers <= 96
