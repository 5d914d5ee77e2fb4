"""The sampler against transformers' warpers and generate, and RAS on hand-made fixtures."""

import math
import types

import pytest
import torch
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from vllm.model_executor.framing import DelayPattern
from vllm.model_executor.heads import CodebookState, FrameStatus
from vllm.sampling_params import SamplingParams
from vllm.v1.sample import Sampler
from vllm.v1.sample.ops import apply_top_k_top_p, draw, top_k_top_p
from vllm.v1.worker.gpu_input_batch import InputBatch

PLAIN = SamplingParams(temperature=1.0, top_k=-1, top_p=1.0, ras_window_length=0)
GREEDY = SamplingParams(temperature=0.0, ras_window_length=0)


class Rig:
    """Rows that are fed logits from outside."""

    def __init__(self, pattern, vocab_size, requests, **limits):
        self.state = CodebookState(pattern, len(requests))
        self.batch = InputBatch(len(requests), vocab_size, "cpu")
        self.sampler = Sampler(pattern)
        for number, (params, seed) in enumerate(requests):
            row = self.batch.add_request(str(number), params, seed)
            self.state.add_row(row, eos_rule=params.eos_rule, **limits)

    def step(self, logits, rows=None):
        """Logits [num_rows, K, V] -> frames [num_rows, K] and statuses [num_rows]."""
        metadata = self.batch.sampling_metadata(range(len(logits)) if rows is None else rows)
        next_frame = self.state.next_frame(metadata.rows)
        width = metadata.history_width
        history = self.state.recent(metadata.rows, width) if width else None
        frames = self.sampler(logits.clone(), metadata, next_frame, history)
        return frames, self.state.advance(metadata.rows, frames)


def past_ramp(rig, num_codebooks, vocab_size, rows):
    """Run rows through their ramp with codes that differ from frame to frame."""
    for frame in range(num_codebooks + 1):
        logits = torch.zeros(rows, num_codebooks, vocab_size)
        logits[:, :, frame + 2] = 1000.0
        rig.step(logits)


# Filters and draws


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [
        *[(50, 1.0), (5, 1.0), (-1, 0.95), (-1, 0.3), (50, 0.95), (10, 0.01), (1, 1)],
        (50, 1e-188),  # 0 in float32
    ],
)
def test_kept_codes_equal_those_of_the_warpers(top_k, top_p):
    logits = torch.randn(4, 8, 1026, generator=torch.Generator().manual_seed(1)) * 3
    expected = logits.reshape(32, 1026)
    if top_k > 0:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    metadata = metadata_of([SamplingParams(top_k=top_k, top_p=top_p)] * 4)
    kept = apply_top_k_top_p(logits.softmax(-1), metadata.filters) > 0
    assert torch.equal(kept.reshape(32, 1026), expected > -math.inf)


def metadata_of(params, vocab_size=1026):
    batch = InputBatch(len(params), vocab_size, "cpu")
    rows = [batch.add_request(str(i), p, i) for i, p in enumerate(params)]
    return batch.sampling_metadata(rows)


def test_rows_with_different_filters_keep_what_each_keeps_alone():
    params = [
        SamplingParams(top_k=k, top_p=p, temperature=t)
        for k, p, t in [
            (50, 0.95, 1.0),
            (-1, 1.0, 1.0),
            (3, 1.0, 1.0),
            (-1, 0.5, 1.0),
            (5, 0.5, 0.0),
        ]
    ]
    probs = (torch.randn(5, 8, 1026, generator=torch.Generator().manual_seed(2)) * 2).softmax(-1)
    together = apply_top_k_top_p(probs.clone(), metadata_of(params).filters)
    for row, setting in enumerate(params[:4]):
        alone = apply_top_k_top_p(probs[row : row + 1].clone(), metadata_of([setting]).filters)
        assert torch.equal(alone[0], together[row])


def test_filters_survive_probabilities_that_are_not_numbers():
    probs = torch.full((1, 8, 1026), math.nan)
    apply_top_k_top_p(probs, metadata_of([SamplingParams(top_k=50, top_p=0.9)]).filters)


def test_codes_as_likely_as_the_kth_are_kept():
    probs = torch.tensor([[[0.1, 0.2, 0.2, 0.2, 0.3]]])
    filters = metadata_of([SamplingParams(top_k=2, top_p=1.0)], vocab_size=5).filters
    assert (apply_top_k_top_p(probs, filters) > 0).tolist() == [[[False, True, True, True, True]]]


def test_top_k_above_the_vocabulary_is_no_filter():
    settings = (torch.tensor([2**31 - 1]).numpy(), torch.ones(1).numpy())
    is_greedy = torch.zeros(1, dtype=torch.bool).numpy()
    assert top_k_top_p(*settings, is_greedy, 1026, torch.device("cpu")) is None


def test_draw_takes_codes_in_index_order_and_never_one_without_weight():
    weights = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0]).expand(6, 1, 6)
    noise = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2.0**-24])[:, None]
    assert draw(weights, noise)[:, 0].tolist() == [1, 1, 3, 3, 4, 4]


def test_draw_survives_weights_that_are_not_numbers():
    assert draw(torch.full((1, 1, 6), math.nan), torch.zeros(1, 1)).item() in range(6)


def test_drawn_codes_follow_the_softmax():
    num_rows, vocab_size = 4000, 12
    pattern = DelayPattern(2, 10, 11)
    rig = Rig(pattern, vocab_size, [(PLAIN, seed) for seed in range(num_rows)])
    past_ramp(rig, 2, vocab_size, num_rows)
    logits = torch.linspace(-1.5, 1.5, vocab_size).flip(0)
    frames, _ = rig.step(logits.expand(num_rows, 2, vocab_size))
    expected = logits[:10].softmax(0) * num_rows
    observed = frames[:, 1].bincount(minlength=vocab_size)
    assert observed[10:].tolist() == [0, 0]
    assert ((observed[:10] - expected) ** 2 / expected).sum() < 27.9  # 9 degrees, p = 0.001


def test_temperature_sharpens():
    requests = [(SamplingParams(temperature=t, top_k=-1, top_p=1.0), 3) for t in (0.05, 50.0)]
    rig = Rig(DelayPattern(8, 1024, 1025), 1026, requests)
    past_ramp(rig, 8, 1026, 2)
    logits = torch.zeros(2, 8, 1026)
    logits[:, :, 700] = 5.0
    frames, _ = rig.step(logits)
    assert frames[0].tolist() == [700] * 8
    assert (frames[1] != 700).sum() >= 7


def test_a_temperature_too_small_to_divide_by_is_greedy():
    metadata = metadata_of([SamplingParams(temperature=t) for t in (1e-44, 1e-300, 1e-6)])
    assert metadata.temperature.is_greedy[:, 0].tolist() == [True, True, False]


def test_temperature_zero_is_argmax_whatever_the_seed_and_the_neighbours():
    logits = torch.randn(3, 8, 1026, generator=torch.Generator().manual_seed(3))
    logits[..., 1024:] = -50
    rig = Rig(DelayPattern(8, 1024, 1025), 1026, [(GREEDY, 1), (SamplingParams(), 1), (GREEDY, 9)])
    past_ramp(rig, 8, 1026, 3)
    frames, _ = rig.step(logits)
    assert torch.equal(frames[::2], logits[::2].argmax(-1))


# Invariance

MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.3, top_k=-1, top_p=0.9),
    SamplingParams(ras_mode="block", ras_window_length=20, ras_max_num_repeat=1),
    SamplingParams(top_k=-1, top_p=1.0, ras_window_length=0),
    SamplingParams(eos_rule="reference", ras_window_length=64),
]


def test_a_row_alone_equals_the_row_among_sixteen():
    pattern, vocab_size, num_steps = DelayPattern(8, 1024, 1025), 1026, 25
    requests = [(MIXED[i % len(MIXED)], 1000 + i) for i in range(16)]
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(num_steps, 16, 8, vocab_size, generator=generator) * 4
    logits[..., 1025] -= 20
    crowd = Rig(pattern, vocab_size, requests)
    together = torch.stack([crowd.step(step)[0] for step in logits])
    for row, request in enumerate(requests):
        solo = Rig(pattern, vocab_size, [request])
        alone = torch.cat([solo.step(step[row : row + 1])[0] for step in logits])
        assert torch.equal(alone, together[:, row])


def test_the_order_of_rows_does_not_matter():
    pattern = DelayPattern(8, 1024, 1025)
    requests = [(MIXED[i % len(MIXED)], i) for i in range(6)]
    one, other = Rig(pattern, 1026, requests), Rig(pattern, 1026, requests)
    generator = torch.Generator().manual_seed(6)
    order = [4, 1, 5, 0, 3, 2]
    for _ in range(12):
        logits = torch.randn(6, 8, 1026, generator=generator) * 3
        frames, status = one.step(logits)
        shuffled, shuffled_status = other.step(logits[order], rows=order)
        assert torch.equal(shuffled, frames[order])
        assert torch.equal(shuffled_status, status[order])


# Repetition


def stuck(params, num_steps=40, seed=7, eos_logit=-30.0):
    """Frames of a model that always wants code 500."""
    rig = Rig(DelayPattern(8, 1024, 1025), 1026, [(params, seed)])
    logits = torch.zeros(1, 8, 1026)
    logits[..., 500] = 6.5  # two in five from the plain softmax, certain after top-p
    logits[..., 1025] = eos_logit
    return torch.cat([rig.step(logits)[0] for _ in range(num_steps)])[8:]


def longest_run(codes):
    longest = run = 0
    for code in codes.tolist():
        run = run + 1 if code == 500 else 0
        longest = max(longest, run)
    return longest


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_ras_breaks_a_stuck_code_up(temperature):
    frames = stuck(SamplingParams(temperature=temperature))
    assert (frames != 500).float().mean() > 0.25
    assert max(longest_run(column) for column in frames.T) < 20


@pytest.mark.parametrize(("window", "repeats"), [(0, 2), (7, 0)])
def test_without_ras_the_code_stays_stuck(window, repeats):
    params = SamplingParams(temperature=0.0, ras_window_length=window, ras_max_num_repeat=repeats)
    assert (stuck(params) == 500).all()


def test_block_mode_never_exceeds_the_limit_in_a_window():
    frames = stuck(SamplingParams(temperature=0.3, ras_mode="block"))
    for start in range(len(frames) - 7):
        assert ((frames[start : start + 8] == 500).sum(0) <= 2).all()
    assert (frames == 500).any()


@pytest.mark.parametrize("mode", ["redraw", "block"])
def test_ras_never_stands_in_the_way_of_eos(mode):
    params = SamplingParams(
        temperature=0.0, ras_mode=mode, ras_max_num_repeat=1, eos_rule="reference"
    )
    pattern = DelayPattern(2, 10, 11)
    rig = Rig(pattern, 12, [(params, 1)])
    past_ramp(rig, 2, 12, 1)
    logits = torch.zeros(1, 2, 12)
    logits[0, 0, 9] = logits[0, 1, 11] = 1000.0  # codebook 1 says EOS again and again
    first, _ = rig.step(logits)
    second, _ = rig.step(logits)
    assert first[0, 1] == second[0, 1] == 11


def test_redraw_happens_at_the_limit_and_not_before():
    params = SamplingParams(temperature=0.0, ras_window_length=3, ras_max_num_repeat=2)
    logits = torch.zeros(1, 1, 1026)
    logits[..., 500] = 0.01  # argmax, but a redraw lands elsewhere
    logits[..., 1025] = -30
    rig = Rig(DelayPattern(1, 1024, 1025), 1026, [(params, 3)])
    codes = [int(rig.step(logits)[0]) for _ in range(9)][1:]
    #        window:  -   1    2 hits: redraw, then 500 falls out of the window of three
    assert [code == 500 for code in codes] == [True, True, False, False, True, True, False, False]


@pytest.mark.parametrize("seed", range(4))
def test_redraw_gives_bos_never_and_eos_only_where_allowed(seed):
    params = SamplingParams(temperature=0.0, ras_window_length=7, ras_max_num_repeat=1)
    rig = Rig(DelayPattern(2, 10, 11), 12, [(params, seed * 1000 + i) for i in range(200)])
    past_ramp(rig, 2, 12, 200)
    logits = torch.zeros(200, 2, 12)
    logits[..., 4] = 0.1  # argmax and in the window, so every row draws anew
    logits[..., 10:] = 0.05
    frames, _ = rig.step(logits)
    assert not (frames == 10).any()
    assert (frames[:, 0] == 11).any()
    assert not (frames[:, 1] == 11).any()


def test_greedy_with_ras_repeats_for_a_seed_and_not_for_another():
    params = SamplingParams(temperature=0.0)
    assert torch.equal(stuck(params, seed=1), stuck(params, seed=1))
    assert not torch.equal(stuck(params, seed=1), stuck(params, seed=2))


# End of stream


def test_strict_rows_end_with_the_delay_pattern_whatever_the_logits_say():
    pattern = DelayPattern(8, 1024, 1025)
    rig = Rig(pattern, 1026, [(SamplingParams(), seed) for seed in range(4)])
    generator = torch.Generator().manual_seed(8)
    frames, statuses = [], []
    for index in range(28):
        logits = torch.randn(4, 8, 1026, generator=generator)
        logits[:, 1:, 1024:] += 30  # stray markers everywhere
        logits[:, 0, 1025] = 60 if index == 20 else -60
        step, status = rig.step(logits)
        frames.append(step)
        statuses.append(status)
    assert torch.stack(statuses[:-1]).eq(FrameStatus.RUNNING).all()
    assert statuses[-1].eq(FrameStatus.STOPPED).all()
    for row in range(4):
        delayed = torch.stack(frames)[:, row].to(torch.int16).numpy()
        codes = pattern.undo(delayed, ended=True)
        assert codes.shape == (8, 19)
        assert (pattern.apply(codes) == delayed).all()


# transformers

V, K, BOS, EOS = 34, 8, 32, 33


@pytest.fixture(scope="module")
def tiny_model():
    torch.manual_seed(0)
    config = HiggsAudioV2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_codebooks=K,
        codebook_size=V,
        audio_stream_bos_id=BOS,
        audio_stream_eos_id=EOS,
        audio_token_id=50,
        audio_bos_token_id=51,
        audio_delay_token_id=52,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = HiggsAudioV2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.audio_lm_head.weight.mul_(20)
    return model


# Row -> {(frame, codebook)} whose EOS logit is raised.
SCRIPTS = types.MappingProxyType(
    {
        "nothing": set(),
        "cb0 only": {(12, 0)},
        "staircase": {(15 + k, k) for k in range(K)},
        "cb3 first": {(20, 3), (26, 0)},
        "cb7 first": {(30, 7)},
        "in the ramp": {(3, 1)},
        "all at once": {(40, k) for k in range(K)},
        "late": {(180, 0)},
    }
)
EXPECTED_FRAMES = {"nothing": 200, "cb0 only": 21, "staircase": 23, "late": 189, "all at once": 41}


def test_greedy_frames_equal_generate_row_for_row(tiny_model):
    num_rows, num_steps = len(SCRIPTS), 200
    calls = []

    def script(module, args, output):
        output = output.clone()
        marks = output.view(num_rows, -1, K, V)[:, -1]
        marks[..., BOS:] -= 30
        for row, marked in enumerate(SCRIPTS.values()):
            for frame, codebook in marked:
                if frame == len(calls):
                    marks[row, codebook, EOS] += 100
        calls.append(marks.detach().clone())
        return output

    prompt = torch.randint(3, 50, (num_rows, 12), generator=torch.Generator().manual_seed(4))
    prompt[:, -1] = 51
    hook = tiny_model.audio_lm_head.register_forward_hook(script)
    with torch.inference_mode():
        frames = tiny_model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_steps,
            do_sample=False,
        )
    hook.remove()
    assert len(calls) == frames.shape[1] == num_steps

    params = SamplingParams(temperature=0.0, ras_window_length=0, eos_rule="reference")
    rig = Rig(DelayPattern(K, BOS, EOS), V, [(params, 0)] * num_rows, frame_limit=num_steps)
    running, lengths = list(range(num_rows)), {}
    for index, logits in enumerate(calls):
        ours, status = rig.step(logits[running].float(), rows=running)
        assert torch.equal(ours, frames[running, index]), f"frame {index}"
        lengths.update({row: index + 1 for row, s in zip(running, status, strict=True) if s})
        running = [row for row, s in zip(running, status, strict=True) if not s]
    assert not running
    named = dict(zip(SCRIPTS, (lengths[row] for row in range(num_rows)), strict=True))
    assert {name: named[name] for name in EXPECTED_FRAMES} == EXPECTED_FRAMES
    for row, length in lengths.items():
        assert (frames[row, length:] == EOS).all()
