"""The native sampler against the torch one and ``CodebookState``, frame by frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.kernels import native
from vllm.kernels.philox import Purpose, uniform
from vllm.kernels.sampler import native_uniform, sample_frames
from vllm.model_executor.framing import DelayPattern
from vllm.model_executor.heads import CodebookState
from vllm.sampling_params import SamplingParams
from vllm.v1.sample import RowSettings, Sampler, SamplingMetadata

pytestmark = pytest.mark.skipif(
    native.loaded_library() is None, reason="the native library is not built"
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=native.supported_isas(), autouse=True)
def isa(request):
    before = native.isa()
    native.select_isa(request.param)
    yield
    native.select_isa(before)


@dataclass
class Rows:
    """Equal streams twice: one for the torch sampler, one for the native one."""

    pattern: DelayPattern
    codebook_size: int
    settings: RowSettings
    torch_state: CodebookState
    native_state: CodebookState

    @classmethod
    def start(cls, params, *, num_codebooks=3, codebook_size=40, frame_limit=None, seeds=None):
        pattern = DelayPattern(num_codebooks, codebook_size - 2, codebook_size - 1)
        num_rows = len(params)
        settings = RowSettings(num_rows)
        states = [CodebookState(pattern, num_rows) for _ in range(2)]
        for row, each in enumerate(params):
            settings.set_row(row, each, seeds[row] if seeds else 2**64 - 1 - row)
            for state in states:
                state.add_row(row, eos_rule=each.eos_rule, frame_limit=frame_limit)
                state.start(torch.tensor([row]))
        return cls(pattern, codebook_size, settings, *states)

    def logits(self, num_rows, scale=3.0):
        return torch.randn(num_rows, self.pattern.num_codebooks, self.codebook_size) * scale

    def torch_step(self, logits, rows):
        metadata = SamplingMetadata.of_rows(rows, self.settings, self.codebook_size, CPU)
        width = metadata.history_width
        state = self.torch_state
        history = state.recent(metadata.rows, width) if width else None
        next_frame = state.next_frame(metadata.rows)
        frames = Sampler(self.pattern)(logits.clone(), metadata, next_frame, history)
        status = state.advance(metadata.rows, frames)
        return frames.numpy(), status.numpy()

    def native_step(self, logits, rows):
        memory = self.native_state.memory
        return sample_frames(
            logits.clone(), memory, self.settings.memory, np.asarray(rows, np.int64)
        )

    def assert_equal_states(self):
        ours, theirs = self.native_state.memory, self.torch_state.memory
        assert torch.equal(ours.counters, theirs.counters)
        assert torch.equal(ours.history, theirs.history)
        assert torch.equal(ours.last_frame, theirs.last_frame)


def is_close_call(rows, row, codebook, logits, code):
    """Whether ``code`` comes of a float64 draw whose number or top-p is moved by 1e-5.

    Only then may the samplers differ: their exponentials and sums round differently.
    """
    settings, state = rows.settings, rows.torch_state
    index = int(state.num_frames[row])
    numbers = [
        float(native_uniform(settings.seed[[row]], np.array([index]), codebook + 1, each)[0, -1])
        for each in Purpose
    ]
    exact = logits.double()
    plain = (exact - exact.max()).exp()
    tempered = (exact / float(settings.temperature[row] or 1)).softmax(-1)
    for shift in (-1e-5, 0.0, 1e-5):
        kept = _kept(tempered, int(settings.top_k[row]), float(settings.top_p[row]) + shift)
        for weights, number in ((kept, numbers[0]), (plain, numbers[1])):
            for nudge in (-1e-5, 0.0, 1e-5):
                target = weights.sum() * min(max(number + nudge, 0.0), 1.0 - 1e-9)
                if int((weights.cumsum(0) <= target).sum()) == code:
                    return True
    return False


def _kept(probs, top_k, top_p):
    ranked = probs.sort(descending=True).values
    cutoff = ranked[top_k - 1] if 1 <= top_k <= len(ranked) else 0.0
    probs = probs.where(probs >= cutoff, 0.0)
    before = ranked.cumsum(0) - ranked
    num_kept = int((before < top_p * probs.sum()).sum())
    return probs.where(probs >= ranked[max(num_kept, 1) - 1], 0.0)


@st.composite
def sampling_params(draw):
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        top_k=draw(st.sampled_from([-1, 0, 1, 2, 5, 50, 2**31 - 1])),
        top_p=draw(st.sampled_from([1e-6, 0.3, 0.95, 1.0])),
        ras_window_length=draw(st.sampled_from([0, 1, 3, 7, 64])),
        ras_max_num_repeat=draw(st.sampled_from([0, 1, 2])),
        ras_mode=draw(st.sampled_from(["redraw", "block"])),
        eos_rule=draw(st.sampled_from(["strict", "reference"])),
    )


@settings(deadline=None, max_examples=25)
@given(
    params=st.lists(sampling_params(), min_size=1, max_size=5),
    num_codebooks=st.integers(1, 5),
    codebook_size=st.sampled_from([4, 9, 40, 1026]),
    scale=st.sampled_from([0.0, 1.0, 4.0, 60.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_torch_sampler(params, num_codebooks, codebook_size, scale, seed):
    torch.manual_seed(seed)
    rows = Rows.start(
        params,
        num_codebooks=num_codebooks,
        codebook_size=codebook_size,
        frame_limit=11,
        seeds=[seed * 2**32 + row for row in range(len(params))],
    )
    order = torch.randperm(len(params)).tolist()
    for _ in range(12):
        logits = rows.logits(len(order), scale)
        before = rows.torch_state.memory
        saved = [rows.torch_state.save_row(row) for row in range(len(params))]
        ours, our_status = rows.native_step(logits, order)
        theirs, their_status = rows.torch_step(logits, order)
        differing = np.argwhere(ours != theirs).tolist()
        if differing:
            for row, snapshot in enumerate(saved):
                rows.torch_state.restore_row(row, snapshot)
            for i, k in differing:
                masked = logits[i, k].clone()
                if before.counters[order[i], -1] == 0:
                    masked[-2:] = -math.inf
                assert is_close_call(rows, order[i], k, masked, ours[i, k]), (i, k)
            return
        assert (our_status == their_status).all()
        rows.assert_equal_states()


def test_many_draws_equal_the_torch_sampler():
    """Default settings at full width: as good as no draw may differ."""
    torch.manual_seed(0)
    rows = Rows.start([SamplingParams()] * 32, num_codebooks=8, codebook_size=1026)
    order = list(range(32))
    num_differing = 0
    for _ in range(20):
        logits = rows.logits(32, 2.0)
        ours, _ = rows.native_step(logits, order)
        theirs, _ = rows.torch_step(logits, order)
        num_differing += int((ours != theirs).sum())
        for row in order:
            rows.native_state.restore_row(row, rows.torch_state.save_row(row))
    assert num_differing <= 2  # of 5,120; see is_close_call


def test_equally_likely_codes_stay_together():
    """Ties at the k-th code and at the last of top-p are kept, as torch keeps them."""
    params = [SamplingParams(top_k=2), SamplingParams(top_k=-1, top_p=0.5), SamplingParams(top_k=3)]
    rows = Rows.start(params, num_codebooks=1, codebook_size=20)
    logits = torch.tensor([1.0, 4.0, 4.0, 4.0, *[0.0] * 16]).expand(3, 1, 20)
    for _ in range(60):
        ours, _ = rows.native_step(logits, [0, 1, 2])
        theirs, _ = rows.torch_step(logits, [0, 1, 2])
        assert (ours == theirs).all()
    drawn = rows.native_state.memory.history[:2, :, 0].unique().tolist()
    assert {1, 2, 3} <= set(drawn)


def test_end_of_speech_runs_down_the_staircase():
    for rule in ("strict", "reference"):
        rows = Rows.start(
            [SamplingParams(temperature=0.0, ras_window_length=0, eos_rule=rule)], num_codebooks=4
        )
        seen = []
        for step in range(16):
            logits = rows.logits(1)
            logits[0, 0, rows.pattern.eos] = 100.0 if step == 6 else -100.0
            logits[0, 1:, rows.pattern.eos] = -100.0
            ours, our_status = rows.native_step(logits, [0])
            theirs, their_status = rows.torch_step(logits, [0])
            assert (ours == theirs).all()
            assert our_status == their_status
            seen.append(int(our_status[0]))
            if our_status:
                break
        assert seen[-1] == 1, rule
        rows.assert_equal_states()


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_is_alone_in_its_codes(num_threads):
    params = [SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(ras_mode="block")]
    logits = torch.randn(3, 3, 40) * 3
    together = Rows.start(params)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        whole, _ = together.native_step(logits, [0, 1, 2])
        for row in range(3):
            alone, _ = Rows.start(params).native_step(logits[row : row + 1], [row])
            assert (alone[0] == whole[row]).all()
    finally:
        torch.set_num_threads(before)


def test_logits_that_are_no_numbers_still_give_codes():
    rows = Rows.start([SamplingParams(), SamplingParams(temperature=0.0)])
    for value in (math.nan, math.inf, -math.inf):
        for _ in range(5):
            frames, _ = rows.native_step(torch.full((2, 3, 40), value), [0, 1])
            assert ((frames >= 0) & (frames < 40)).all()


@settings(deadline=None, max_examples=30)
@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4),
    step=st.integers(0, 2**32 - 1),
    num_codebooks=st.integers(1, 9),
    purpose=st.sampled_from(list(Purpose)),
)
def test_noise_equals_philox_to_the_bit(seeds, step, num_codebooks, purpose):
    seed = np.asarray(seeds, np.uint64)
    steps = np.full(len(seeds), step)
    expected = uniform(
        torch.from_numpy(seed.view(np.int64)), torch.from_numpy(steps), num_codebooks, [purpose]
    )[0]
    ours = native_uniform(seed, steps, num_codebooks, purpose)
    assert np.array_equal(ours, expected.numpy())
