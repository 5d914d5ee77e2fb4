"""Scheduler: order, coalescing, preemption, ends and outputs, against the fake worker."""

from __future__ import annotations

import numpy as np
import pytest

from vllm.exceptions import InvalidRequestError, PromptTooLongError
from vllm.outputs import FinishReason
from vllm.v1.core import StepKind
from vllm.v1.outputs import AudioChunk, ModelRunnerOutput
from vllm.v1.request import RequestStatus

NUM_CODEBOOKS = 4


# One request


def test_eos_end_sends_every_frame_once(make_bench, make_request, expected_codes):
    bench = make_bench()
    bench.worker.ends["a"] = 13
    bench.scheduler.add_request(make_request("a"))
    bench.run_until_idle()
    assert bench.reason("a") is FinishReason.STOP
    np.testing.assert_array_equal(bench.codes("a"), expected_codes("a", 13))
    assert bench.delayed_codes("a").shape == (13 + NUM_CODEBOOKS + 1, NUM_CODEBOOKS)
    assert (bench.delayed_codes("a")[0] == 1024).all()
    assert (bench.delayed_codes("a")[-1] == 1025).all()
    assert bench.num_samples("a") == 13 * 2


def test_limit_end_gives_the_reason_of_the_limit(make_bench, make_request, expected_codes):
    bench = make_bench()
    bench.scheduler.add_request(make_request("a", frame_limit=21))
    bench.run_until_idle()
    assert bench.reason("a") is FinishReason.MAX_AUDIO
    assert len(bench.delayed_codes("a")) == 21
    np.testing.assert_array_equal(bench.codes("a"), expected_codes("a", 21 - NUM_CODEBOOKS))


@pytest.mark.parametrize("frame_limit", [1, 2, NUM_CODEBOOKS])
def test_limit_below_one_real_frame_still_ends(make_bench, make_request, frame_limit):
    bench = make_bench()
    bench.scheduler.add_request(make_request("a", frame_limit=frame_limit))
    bench.run_until_idle()
    assert bench.reason("a") is FinishReason.MAX_AUDIO
    assert len(bench.delayed_codes("a")) == frame_limit
    assert bench.codes("a").shape == (NUM_CODEBOOKS, 0)


@pytest.mark.parametrize("num_prompt", [7, 8, 9, 15, 16])
def test_blocks_follow_positions_exactly(make_bench, make_request, num_prompt):
    bench = make_bench(block_size=8)
    bench.scheduler.add_request(make_request("a", num_prompt))
    held = 0
    for step in range(40):
        plan = bench.step()
        held += len(plan.new_blocks.get("a", ()))
        last_position = num_prompt + max(step - 1, 0)  # written by this step, or by the next one
        assert held == last_position // 8 + 1


def test_increments_never_run_ahead_of_the_audio(make_bench, make_request):
    bench = make_bench()
    bench.worker.ends["a"] = 30
    bench.scheduler.add_request(make_request("a"))
    bench.run_until_idle()
    num_real = num_delayed = 0
    for output in bench.outputs["a"][:-1]:
        num_real += len(output.codes) // (2 * NUM_CODEBOOKS)
        num_delayed += len(output.delayed_codes) // (2 * NUM_CODEBOOKS)
        assert num_delayed == num_real + NUM_CODEBOOKS


def test_codes_outside_the_codec_are_clipped(make_bench, make_request):
    bench = make_bench()
    bench.scheduler.add_request(make_request("a", frame_limit=NUM_CODEBOOKS + 3))
    plan = bench.step()
    for _ in range(NUM_CODEBOOKS + 2):
        plan = bench.scheduler.schedule()
        bench.scheduler.update_from_output(
            plan,
            ModelRunnerOutput(
                request_ids=plan.decode,
                frames=np.full((1, NUM_CODEBOOKS), 1025, np.int16),
                finish=np.zeros(1, np.uint8),
            ),
        )
    chunk = AudioChunk("a", np.zeros(2, np.float32), 1)
    (output,) = bench.scheduler.update_from_output(
        bench.scheduler.schedule(), ModelRunnerOutput(chunks=(chunk,))
    )
    assert np.frombuffer(output.codes, np.int16).tolist() == [1023] * NUM_CODEBOOKS


def test_frames_are_cut_to_the_context(make_bench, make_request):
    bench = make_bench(max_model_len=64)
    bench.scheduler.add_request(make_request("a", 40))
    bench.run_until_idle()
    assert bench.reason("a") is FinishReason.LENGTH
    assert len(bench.delayed_codes("a")) == 64 - 40


def test_frames_are_cut_to_the_cache(make_bench, make_request):
    bench = make_bench(num_blocks=4, block_size=8)
    bench.scheduler.add_request(make_request("a", 20))
    bench.run_until_idle()
    assert bench.reason("a") is FinishReason.LENGTH
    assert len(bench.delayed_codes("a")) == 32 - 20


def test_stats_of_a_request(make_bench, make_request):
    bench = make_bench(max_num_batched_tokens=16)
    bench.worker.ends["a"] = 3
    bench.scheduler.add_request(make_request("a", 48, arrival_time=bench.clock.now - 0.5))
    bench.run_until_idle()
    stats = bench.outputs["a"][-1].stats
    assert stats.queue_time_s == pytest.approx(0.5)
    assert stats.prefill_time_s == pytest.approx(0.002)  # three chunks, a millisecond apart
    assert stats.decode_time_s == pytest.approx(0.001 * (3 + NUM_CODEBOOKS))
    assert all(output.stats is None for output in bench.outputs["a"][:-1])


# Refusals


def test_prompt_that_never_fits_the_cache_is_refused(make_bench, make_request):
    bench = make_bench(num_blocks=4, block_size=8)
    with pytest.raises(PromptTooLongError, match="25 positions; the KV cache holds 32"):
        bench.scheduler.add_request(make_request("a", 25))
    assert not bench.scheduler.has_unfinished()


def test_prompt_that_fills_the_context_is_refused(make_bench, make_request):
    bench = make_bench(max_model_len=64)
    with pytest.raises(PromptTooLongError, match="64 positions; the context holds 64"):
        bench.scheduler.add_request(make_request("a", 64))


def test_id_in_use_is_refused(make_bench, make_request):
    bench = make_bench()
    bench.scheduler.add_request(make_request("a"))
    with pytest.raises(InvalidRequestError, match="request_id='a' is in use"):
        bench.scheduler.add_request(make_request("a"))


# Order


def test_admission_is_first_come_first_served(make_bench, make_request):
    bench = make_bench(max_num_seqs=2)
    for name in "abcd":
        bench.worker.ends[name] = 5
        bench.scheduler.add_request(make_request(name))
    admitted = [data.request_id for plan in bench.run_until_idle() for data in plan.new]
    assert admitted == ["a", "b", "c", "d"]


def test_smaller_priority_is_admitted_first(make_bench, make_request):
    bench = make_bench()
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1)):
        bench.scheduler.add_request(make_request(name, priority=priority))
    assert [data.request_id for data in bench.step().new] == ["d", "b", "a", "c"]


def test_rows_are_bounded(make_bench, make_request):
    bench = make_bench(max_num_seqs=3)
    for index in range(5):
        bench.scheduler.add_request(make_request(f"r{index}"))
    bench.step()
    stats = bench.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (3, 2)


def test_finishing_requests_hold_no_row(make_bench, make_request):
    bench = make_bench(max_num_seqs=1)
    bench.worker.ends["a"] = 2
    bench.worker.holds_audio = lambda: True
    bench.scheduler.add_request(make_request("a"))
    while not bench.scheduler.stats().num_finishing:
        bench.step()
    assert bench.scheduler.stats().kv_cache_usage == 0
    bench.scheduler.add_request(make_request("b"))
    assert [data.request_id for data in bench.step().new] == ["b"]
    assert bench.reason("a") is None
    bench.worker.holds_audio = lambda: False
    bench.step()
    assert bench.reason("a") is FinishReason.STOP


# Prefill steps


def test_long_prompt_is_prefilled_in_chunks(make_bench, make_request):
    bench = make_bench(max_num_batched_tokens=16)
    bench.scheduler.add_request(make_request("a", 40))
    chunks = [bench.step().prefill[0] for _ in range(3)]
    assert [(c.start, c.length, c.is_last) for c in chunks] == [
        (0, 16, False),
        (16, 16, False),
        (32, 8, True),
    ]


def test_prompts_share_the_budget_of_a_step(make_bench, make_request):
    bench = make_bench(max_num_batched_tokens=32)
    for name in "abc":
        bench.scheduler.add_request(make_request(name, 20))
    assert [(c.request_id, c.length) for c in bench.step().prefill] == [("a", 20), ("b", 12)]


def _bench_with_one_running(make_bench, make_request, **config):
    bench = make_bench(**config)
    bench.scheduler.add_request(make_request("running"))
    kinds = [bench.step().step_kind for _ in range(3)]
    assert kinds[-1] is StepKind.DECODE
    return bench


def test_few_waiting_prompts_are_held_back(make_bench, make_request):
    bench = _bench_with_one_running(make_bench, make_request, prefill_max_wait_ms=5.0)
    bench.scheduler.add_request(make_request("a"))
    kinds = [bench.step().step_kind for _ in range(6)]  # a millisecond each
    assert kinds == [StepKind.DECODE] * 5 + [StepKind.PREFILL]


def test_enough_waiting_requests_are_prefilled_at_once(make_bench, make_request):
    bench = _bench_with_one_running(make_bench, make_request, prefill_min_requests=2)
    bench.scheduler.add_request(make_request("a"))
    assert bench.step().step_kind is StepKind.DECODE
    bench.scheduler.add_request(make_request("b"))
    assert bench.step().step_kind is StepKind.PREFILL


def test_enough_waiting_positions_are_prefilled_at_once(make_bench, make_request):
    bench = _bench_with_one_running(make_bench, make_request, prefill_min_tokens=50)
    bench.scheduler.add_request(make_request("a", 30))
    assert bench.step().step_kind is StepKind.DECODE
    bench.scheduler.add_request(make_request("b", 30))
    assert bench.step().step_kind is StepKind.PREFILL


def test_decode_runs_between_prefill_steps(make_bench, make_request):
    bench = _bench_with_one_running(
        make_bench, make_request, max_num_batched_tokens=16, prefill_min_requests=1
    )
    bench.scheduler.add_request(make_request("a", 64))
    kinds = [bench.step().step_kind for _ in range(8)]
    assert kinds == [StepKind.PREFILL, StepKind.DECODE] * 4


def test_a_steady_decode_step_changes_nothing(make_bench, make_request):
    bench = _bench_with_one_running(make_bench, make_request, block_size=64)
    first, second = bench.step(), bench.step()
    assert second.decode is first.decode
    assert not any((second.new_blocks, second.new, second.finished))


# Prefix cache


def test_equal_prompt_is_taken_from_the_cache(make_bench, make_request):
    bench = make_bench(block_size=8)
    for name in ("a", "b"):
        bench.worker.ends[name] = 4
        bench.scheduler.add_request(make_request(name, 20, token_seed=1))
        bench.run_until_idle()
    stats = bench.scheduler.stats()
    assert bench.outputs["b"][-1].stats.num_cached_positions == 16
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (40, 16)


def test_wholly_cached_prompt_decodes_at_once(make_bench, make_request):
    bench = make_bench(block_size=8)
    bench.scheduler.add_request(make_request("a", 24, token_seed=1))
    bench.step()
    bench.scheduler.finish_requests(["a"], FinishReason.ABORT)
    bench.scheduler.add_request(make_request("b", 24, token_seed=1))
    plan = bench.step()
    assert plan.step_kind is StepKind.DECODE
    assert plan.decode == ("b",)


def _say_all(bench, requests):
    for request in requests:
        bench.worker.ends[request.request_id] = 4
        bench.scheduler.add_request(request)
        bench.run_until_idle()


@pytest.mark.parametrize("num_pinned", [0, 16])
def test_a_pinned_beginning_outlives_prompts_that_come_twice(make_bench, make_request, num_pinned):
    bench = make_bench(block_size=8, num_blocks=16)
    voice = [
        make_request(f"voice {index}", 20, token_seed=1, num_pinned=num_pinned) for index in (0, 1)
    ]
    _say_all(bench, voice[:1])
    _say_all(
        bench, [make_request(f"{i}, {turn}", 40, token_seed=i) for i in range(9) for turn in (0, 1)]
    )
    _say_all(bench, voice[1:])
    assert bench.outputs["voice 1"][-1].stats.num_cached_positions == num_pinned


def test_pinned_blocks_give_way_before_anybody_waits(make_bench, make_request):
    bench = make_bench(block_size=8, num_blocks=16)
    _say_all(bench, [make_request("voice", 33, token_seed=1, num_pinned=33)])
    assert bench.scheduler.stats().num_pinned_blocks == bench.scheduler.max_pinned_blocks == 4
    bench.scheduler.add_request(make_request("long", 15 * 8 - 1, frame_limit=8))
    assert bench.step().new_blocks.keys() == {"long"}
    stats = bench.scheduler.stats()
    assert (stats.num_pinned_blocks, stats.num_preemptions) == (1, 0)


def test_clip_codes_are_part_of_the_prefix(make_bench, make_request):
    bench = make_bench(block_size=8)
    for name, offset in (("a", 0), ("b", 1), ("c", 0)):
        bench.worker.ends[name] = 4
        bench.scheduler.add_request(
            make_request(name, 20, token_seed=1, num_audio=4, code_offset=offset)
        )
        bench.run_until_idle()
    cached = [bench.outputs[name][-1].stats.num_cached_positions for name in "abc"]
    assert cached == [0, 0, 16]


def test_blocks_are_found_only_after_their_step_has_run(make_bench, make_request):
    bench = make_bench(block_size=8, max_num_batched_tokens=16)
    bench.scheduler.add_request(make_request("a", 24, token_seed=1))
    bench.scheduler.add_request(make_request("b", 24, token_seed=1))
    plan = bench.scheduler.schedule()
    assert [c.request_id for c in plan.prefill] == ["a"]
    assert bench.scheduler.stats().prefix_cache_hits == 0
    bench.finish(plan)
    plan = bench.step()
    starts = {c.request_id: c.start for c in plan.prefill}
    assert starts == {"a": 16, "b": 16}


def test_failed_prefill_leaves_nothing_in_the_cache(make_bench, make_request):
    bench = make_bench(block_size=8)
    bench.worker.failing["a"] = "no luck"
    bench.scheduler.add_request(make_request("a", 24, token_seed=1))
    bench.step()
    assert bench.reason("a") is FinishReason.ERROR
    bench.scheduler.add_request(make_request("b", 24, token_seed=1))
    assert bench.step().prefill[0].start == 0


def test_caching_can_be_switched_off(make_bench, make_request):
    bench = make_bench(enable_prefix_caching=False)
    for name in ("a", "b"):
        bench.worker.ends[name] = 4
        bench.scheduler.add_request(make_request(name, 24, token_seed=1))
        bench.run_until_idle()
    assert bench.outputs["b"][-1].stats.num_cached_positions == 0
    assert bench.scheduler.stats().prefix_cache_queries == 0


# Preemption


def _preempted(bench, *, max_steps=200):
    """Step until somebody is swapped out; returns that plan."""
    for _ in range(max_steps):
        plan = bench.step()
        if plan.swap_out:
            return plan
    raise AssertionError("nobody was swapped out")


def test_latest_arrival_is_swapped_and_comes_back(make_bench, make_request, expected_codes):
    bench = make_bench(num_blocks=10, block_size=8)
    for name in ("a", "b"):
        bench.worker.ends[name] = 40
        bench.scheduler.add_request(make_request(name, 20))
    plan = _preempted(bench)
    assert list(plan.swap_out) == ["b"]
    assert plan.decode == ("a",)
    bench.run_until_idle()
    assert bench.outputs["b"][-1].stats.num_preemptions == 1
    for name in ("a", "b"):
        np.testing.assert_array_equal(bench.codes(name), expected_codes(name, 40))


def test_lowest_priority_is_swapped_before_the_latest(make_bench, make_request):
    bench = make_bench(num_blocks=10, block_size=8)
    bench.scheduler.add_request(make_request("a", 20, priority=1))
    bench.scheduler.add_request(make_request("b", 20, priority=0))
    assert list(_preempted(bench).swap_out) == ["a"]


def test_swapped_request_resumes_before_new_ones_are_admitted(make_bench, make_request):
    bench = make_bench(num_blocks=10, block_size=8)
    for name in ("a", "b"):
        bench.worker.ends[name] = 30
        bench.scheduler.add_request(make_request(name, 20))
    _preempted(bench)
    bench.scheduler.add_request(make_request("c", 4, frame_limit=9, priority=-5))
    order = []
    for plan in bench.run_until_idle():
        order += [*plan.swap_in, *(data.request_id for data in plan.new)]
    assert order == ["b", "c"]


def test_request_is_swapped_in_the_middle_of_its_prefill(make_bench, make_request):
    bench = make_bench(
        num_blocks=28, block_size=8, max_num_batched_tokens=16, prefill_min_requests=1
    )
    bench.worker.ends.update(a=30, b=10)
    bench.scheduler.add_request(make_request("a", 14))
    bench.step()
    bench.scheduler.add_request(make_request("b", 192))
    plans = []
    while not plans or not plans[-1].swap_out:
        plans.append(bench.step())
        assert len(plans) < 100, "nobody was swapped out"
    num_prefilled = sum(chunk.length for plan in plans for chunk in plan.prefill)
    assert 0 < num_prefilled < 192
    assert list(plans[-1].swap_out) == ["b"]
    assert len(plans[-1].swap_out["b"]) == num_prefilled // 8  # only pages that were written
    plans += bench.run_until_idle()
    starts = [chunk.start for plan in plans for chunk in plan.prefill]
    assert starts == list(range(0, 192, 16))
    assert bench.reason("b") is FinishReason.STOP


# Ends from outside


def _reach(bench, make_request, status):
    """A request ``x`` in the given state, together with what it takes to get it there."""
    scheduler = bench.scheduler
    request = make_request("x", 40, frame_limit=30)
    if status is RequestStatus.SWAPPED:
        scheduler.add_request(make_request("other", 20))
        bench.step()
    scheduler.add_request(request)
    if status is RequestStatus.FINISHING:
        bench.worker.holds_audio = lambda: True
    for _ in range(100):
        if request.status is status:
            return
        bench.step()
    raise AssertionError(f"never reached {status}")


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.DEADLINE])
@pytest.mark.parametrize(
    "status",
    [
        RequestStatus.WAITING,
        RequestStatus.PREFILLING,
        RequestStatus.RUNNING,
        RequestStatus.SWAPPED,
        RequestStatus.FINISHING,
    ],
)
def test_end_from_outside_frees_within_one_step(make_bench, make_request, status, reason):
    bench = make_bench(num_blocks=11, block_size=8, max_num_batched_tokens=16)
    _reach(bench, make_request, status)
    others = ["other"] if status is RequestStatus.SWAPPED else []
    bench.scheduler.finish_requests(["x", *others, "unknown"], reason)
    bench.scheduler.finish_requests(["x"], FinishReason.ABORT)
    plan = bench.step()
    was_known = status is not RequestStatus.WAITING
    assert plan.finished == frozenset(["x", *others] if was_known else [])
    assert plan.step_kind is StepKind.IDLE
    assert bench.reason("x") is reason
    assert bench.scheduler.stats().kv_cache_usage == 0
    assert not bench.scheduler.has_unfinished()
    assert bench.worker.num_held == 0


def test_abort_between_plan_and_result(make_bench, make_request):
    bench = make_bench()
    bench.scheduler.add_request(make_request("a"))
    bench.scheduler.add_request(make_request("b", frame_limit=12))
    bench.step()
    plan = bench.scheduler.schedule()
    bench.scheduler.finish_requests(["a"], FinishReason.ABORT)
    bench.finish(plan)
    assert bench.reason("a") is FinishReason.ABORT
    bench.run_until_idle()
    assert bench.reason("b") is FinishReason.MAX_AUDIO


def test_failed_step_ends_only_its_request(make_bench, make_request):
    bench = make_bench()
    for name in ("a", "b"):
        bench.scheduler.add_request(make_request(name, frame_limit=15))
    bench.step()
    bench.worker.failing["a"] = "numbers ran out"
    bench.step()
    assert bench.reason("a") is FinishReason.ERROR
    assert bench.outputs["a"][-1].error == "numbers ran out"
    assert bench.step().finished == {"a"}
    bench.run_until_idle()
    assert bench.reason("b") is FinishReason.MAX_AUDIO


def test_codec_error_ends_the_request(make_bench, make_request):
    bench = make_bench()
    bench.scheduler.add_request(make_request("a"))
    bench.step()
    chunk = AudioChunk("a", np.zeros(0, np.float32), 0, error="codec broke")
    (output,) = bench.scheduler.update_from_output(
        bench.scheduler.schedule(), ModelRunnerOutput(chunks=(chunk,))
    )
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, "codec broke")
    assert bench.scheduler.schedule().finished == {"a"}


def test_late_audio_is_ignored(make_bench):
    bench = make_bench()
    chunk = AudioChunk("gone", np.zeros(0, np.float32), 0, final=True)
    plan = bench.scheduler.schedule()
    assert bench.scheduler.update_from_output(plan, ModelRunnerOutput(chunks=(chunk,))) == []


# Silence guard


def test_silence_cut_ends_a_running_request(make_bench, make_request, expected_codes):
    bench = make_bench()
    bench.worker.cuts["a"] = 11
    bench.scheduler.add_request(make_request("a"))
    plans = bench.run_until_idle()
    assert bench.reason("a") is FinishReason.SILENCE
    np.testing.assert_array_equal(bench.codes("a"), expected_codes("a", 11))
    assert len(bench.delayed_codes("a")) == 11 + NUM_CODEBOOKS
    assert plans[-1].finished == {"a"}


def test_silence_cut_does_not_depend_on_when_it_was_noticed(make_bench, make_request):
    results = []
    for is_late in (False, True):
        bench = make_bench()
        bench.worker.cuts["a"] = 11
        bench.worker.ends["a"] = 14
        if is_late:  # the codec answers only after the last frame has been made
            bench.worker.holds_audio = lambda bench=bench: "a" not in bench.worker.codec
        bench.scheduler.add_request(make_request("a"))
        bench.run_until_idle()
        results.append((bench.reason("a"), bench.delayed_codes("a").tobytes()))
    assert results[0] == results[1]
    assert results[0][0] is FinishReason.SILENCE
