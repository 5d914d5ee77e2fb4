"""Who is in a decode step when steps take longer than the audio that they make."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.outputs import FinishReason
from vllm.player import Listener
from vllm.v1.core.row_turns import RowTurns

FRAME_S = 0.04
NUM_CODEBOOKS = 4
NOW = 100.0


@pytest.fixture
def make_rows(make_request):
    """Running requests by kind: h(ears silence soon), f(ar ahead), n(obody listens)."""
    listeners = {"h": Listener(1.0, NOW + 0.5), "f": Listener(1.0, NOW + 60.0), "n": None}

    def make(kinds):
        return [make_request(f"{k}{i}", listener=listeners[k]) for i, k in enumerate(kinds)]

    return make


@pytest.fixture
def saturated():
    """Turns after many slow steps over all rows."""
    turns = RowTurns(FRAME_S)
    for _ in range(20):
        turns.record(3 * FRAME_S)
    return turns


def choose(turns, rows):
    chosen = turns.choose(rows, NOW)
    return rows if chosen is None else chosen


def test_all_rows_while_steps_are_shorter_than_frames(make_rows):
    turns = RowTurns(FRAME_S)
    for _ in range(50):
        assert turns.choose(make_rows("hnnnn"), NOW) is None
        turns.record(0.9 * FRAME_S)


@pytest.mark.parametrize("kinds", ["nnnn", "ffff", "fnfn", "hhhh", "h", "n"])
def test_all_rows_where_none_must_wait_for_another(make_rows, saturated, kinds):
    assert saturated.choose(make_rows(kinds), NOW) is None


def test_the_others_take_turns_beside_whom_silence_threatens(make_rows, saturated):
    rows = make_rows("nhnfnnhfnn")
    steps = [choose(saturated, rows) for _ in range(4)]
    for step in steps:
        assert {"h1", "h6"} <= {row.request_id for row in step}
        assert len(step) == 4
        assert step == [row for row in rows if row in step], "the order of rows has changed"
    assert {row for step in steps for row in step} == set(rows)


def test_frames_that_are_not_yet_audio_count_as_ahead(make_rows, saturated):
    rows = make_rows("hhhhhhhh")
    for row in rows[1:]:
        for _ in range(NUM_CODEBOOKS + 60):
            row.append_frame(np.zeros(NUM_CODEBOOKS, np.int16).tobytes())
    assert len(choose(saturated, rows)) == 1 + 2


def test_a_fast_listener_is_served_sooner(make_request, saturated):
    rows = [
        make_request(name, listener=Listener(speed, NOW))
        for name, speed in (("fast", 2.0), ("normal", 1.0))
    ]
    for row in rows:
        for _ in range(NUM_CODEBOOKS + 60):  # 2.4 s, or 1.2 s at double speed
            row.append_frame(np.zeros(NUM_CODEBOOKS, np.int16).tobytes())
    others = [make_request(f"n{i}") for i in range(7)]
    chosen = [choose(saturated, [*rows, *others]) for _ in range(4)]
    assert all(rows[0] in step for step in chosen)
    assert sum(rows[1] in step for step in chosen) < 4


def test_smaller_steps_that_are_no_shorter_are_given_up_and_tried_again(make_rows, saturated):
    rows = make_rows("hnnnnnnn")
    were_partial = []
    for _ in range(200):
        were_partial.append(saturated.choose(rows, NOW) is not None)
        saturated.record(3 * FRAME_S)
    assert 0 < sum(were_partial) < 40
    assert any(were_partial[100:])


def test_an_idle_device_is_noticed_while_rows_take_turns(make_rows, saturated):
    rows = make_rows("hnnnnnnn")
    for _ in range(100):
        saturated.choose(rows, NOW)
        saturated.record(0.1 * FRAME_S)
    assert saturated.choose(rows, NOW) is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_row_waits_for_more_steps_than_there_are_rows(data):
    """Rows come, go and change their need at random; each is in a step again in time."""
    turns = RowTurns(FRAME_S)
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    rows, left_out, most = [], {}, {}
    for _ in range(20):
        turns.record(1.0)
    for index in range(150):
        if rng.random() < 0.4 and len(rows) < 24:
            rows.append(_Row(f"r{index}"))
        if rows and rng.random() < 0.2:
            rows.remove(rng.choice(rows))
        for row in rows:
            if rng.random() < 0.2:
                row.player = rng.choice([None, _Player(NOW), _Player(NOW + 60.0)])
            most[row] = max(most.get(row, 0), len(rows))
        chosen = turns.choose(rows, NOW)
        turns.record(1.0 if chosen is None else 0.1)
        for row in rows:
            is_in = chosen is None or row in chosen
            left_out[row] = 0 if is_in else left_out.get(row, 0) + 1
            most[row] = 0 if is_in else most[row]
            assert left_out[row] <= most[row], "a row starves"


class _Player:
    speed = 1.0

    def __init__(self, dry_at):
        self.dry_at = dry_at


class _Row:
    """What ``RowTurns`` reads of a request."""

    num_unsent_frames = 0

    def __init__(self, name):
        self.request_id = name
        self.player = None
        self.last_turn = 0


@pytest.mark.parametrize("seed", range(4))
def test_requests_end_the_same_when_rows_take_turns(make_bench, make_request, expected_codes, seed):
    rng = random.Random(seed)
    bench = make_bench(num_blocks=rng.choice([24, 60]), block_size=8, max_num_seqs=8)
    bench.step_s = lambda plan: 0.01 + 0.01 * len(plan.decode)
    num_real, num_partial = {}, 0
    for _ in range(400):
        if rng.random() < 0.3 and len(num_real) < 60:
            name = f"r{len(num_real)}"
            num_real[name] = rng.randint(1, 60)
            bench.worker.ends[name] = num_real[name]
            listener = Listener(1.0, bench.clock.now) if rng.random() < 0.3 else None
            bench.scheduler.add_request(make_request(name, rng.randint(3, 30), listener=listener))
        plan = bench.scheduler.schedule()
        num_partial += 0 < len(plan.decode) < len(bench.scheduler._running)
        bench.finish(plan)
    bench.run_until_idle()
    assert num_partial > 30, "rows hardly took turns"
    for name, num_frames in num_real.items():
        assert bench.reason(name) is FinishReason.STOP
        np.testing.assert_array_equal(bench.codes(name), expected_codes(name, num_frames))
    assert bench.scheduler.stats().kv_cache_usage == 0
