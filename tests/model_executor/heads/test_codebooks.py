"""The codebook state machine: traces, limits, and save and restore."""

import numpy as np
import pytest
import torch

from vllm.model_executor.framing import DelayPattern
from vllm.model_executor.heads import CodebookState, FrameStatus

B, E = 1024, 1025
X = 99  # whatever the model says where it has no say
ROW = torch.tensor([0])


def run(state, drawn, row=0):
    """Feed free draws frame by frame; return stored frames and the last status."""
    rows = torch.tensor([row])
    frames, status = [], FrameStatus.RUNNING
    for codes in drawn:
        allowed = state.next_frame(rows)
        frame = torch.where(allowed.forced >= 0, allowed.forced, torch.tensor([codes]))
        assert status == FrameStatus.RUNNING, "went on after the end"
        status = FrameStatus(int(state.advance(rows, frame)))
        frames.append(frame[0].tolist())
    return frames, status


def test_strict_trace_is_the_delay_pattern():
    state = CodebookState(DelayPattern(3, B, E), 1)
    state.add_row(0)
    drawn = [[X] * 3, [11, X, X], [12, 21, X], [13, 22, 31], [E, 23, 32], [X, X, 33], [X] * 3]
    frames, status = run(state, drawn)
    codes = np.array([[11, 12, 13], [21, 22, 23], [31, 32, 33]])
    assert frames == DelayPattern(3, B, E).apply(codes).tolist()
    assert status == FrameStatus.STOPPED


def test_reference_lets_each_codebook_end_itself_one_frame_later_than_strict():
    state = CodebookState(DelayPattern(3, B, E), 1)
    state.add_row(0, eos_rule="reference")
    drawn = [[X] * 3, [11, X, X], [12, 21, X], [E, 22, 31], [7, 23, 32], [8, 9, 33], [8, 9, 7]]
    frames, status = run(state, drawn)
    assert frames[3:] == [[E, 22, 31], [E, 23, 32], [E, E, 33], [E, E, E]]
    assert status == FrameStatus.STOPPED


def test_reference_does_not_fill_lower_codebooks_at_once():
    state = CodebookState(DelayPattern(3, B, E), 1)
    state.add_row(0, eos_rule="reference")
    drawn = [[X] * 3, [11, X, X], [12, 21, X], [13, 22, E], [14, 23, 32], [15, 24, 33], [1, 2, 3]]
    frames, status = run(state, drawn)
    assert frames[3:] == [[13, 22, E], [E, 23, 32], [E, E, 33], [E, E, E]]
    assert status == FrameStatus.STOPPED


def test_strict_lets_only_codebook_zero_end_after_one_frame_of_sound():
    state = CodebookState(DelayPattern(3, B, E), 1)
    state.add_row(0)
    allowed_eos = []
    for _ in range(5):
        allowed = state.next_frame(ROW)
        assert not allowed.allow_bos.any()
        allowed_eos.append((allowed.allow_eos & (allowed.forced < 0))[0].tolist())
        state.advance(ROW, torch.where(allowed.forced >= 0, allowed.forced, X))
    never, first = [False] * 3, [True, False, False]
    assert allowed_eos == [never, never, first, first, first]


def test_start_appends_the_bos_frame():
    state = CodebookState(DelayPattern(3, B, E), 2)
    state.add_row(1)
    assert state.start(torch.tensor([1])).tolist() == [FrameStatus.RUNNING]
    assert state.last_frame[1].tolist() == [B] * 3
    assert state.num_frames.tolist() == [0, 1]


@pytest.mark.parametrize("limit", [1, 4, 9])
def test_frame_limit_ends_the_row_at_that_frame(limit):
    state = CodebookState(DelayPattern(3, B, E), 1)
    state.add_row(0, frame_limit=limit)
    frames, status = run(state, [[X] * 3] * limit)
    assert len(frames) == limit
    assert status == FrameStatus.LIMIT


def test_an_end_at_the_limit_is_an_end():
    state = CodebookState(DelayPattern(3, B, E), 1)
    state.add_row(0, frame_limit=5)
    assert run(state, [[X] * 3, [X] * 3, [E, X, X], [X] * 3, [X] * 3])[1] == FrameStatus.STOPPED


def test_recent_codes_are_newest_first_without_markers():
    state = CodebookState(DelayPattern(3, B, E), 1)
    state.add_row(0)
    run(state, [[X] * 3, [11, X, X], [12, 21, X]])
    assert state.recent(ROW, 4).tolist() == [[[12, 21, -1], [11, -1, -1], [-1] * 3, [-1] * 3]]


def test_recent_codes_survive_the_turn_of_the_ring():
    state = CodebookState(DelayPattern(1, B, E), 1)
    state.add_row(0)
    run(state, [[i] for i in range(150)])
    assert state.recent(ROW, 64)[0, :, 0].tolist() == list(range(149, 85, -1))


def test_a_reused_row_starts_clean():
    state = CodebookState(DelayPattern(3, B, E), 1)
    state.add_row(0, eos_rule="reference", frame_limit=50)
    run(state, [[X] * 3, [1] * 3, [2] * 3, [E] * 3])
    state.add_row(0)
    fresh = CodebookState(DelayPattern(3, B, E), 1)
    fresh.add_row(0)
    drawn = [[X] * 3, [3] * 3, [4, 5, 6], [E, 2, 2], [X] * 3]
    assert run(state, drawn) == run(fresh, drawn)
    assert torch.equal(state.recent(ROW, 64), fresh.recent(ROW, 64))


@pytest.mark.parametrize("cut", [1, 3, 5, 6, 7])
def test_save_and_restore_elsewhere_goes_on_as_uninterrupted(cut):
    drawn = [[i, i + 20, i + 40] for i in range(5)] + [[E, 7, 8], [X] * 3, [X] * 3]
    whole = CodebookState(DelayPattern(3, B, E), 3)
    whole.add_row(0)
    expected, status = run(whole, drawn)

    state = CodebookState(DelayPattern(3, B, E), 3)
    state.add_row(0)
    before, _ = run(state, drawn[:cut])
    saved = state.save_row(0)
    state.add_row(0)
    run(state, [[X] * 3] * 5)  # somebody else
    state.restore_row(2, saved)
    after, status_after = run(state, drawn[cut:], row=2)
    assert (before + after, status_after) == (expected, status)
    recent = state.recent(torch.tensor([2]), 64)
    assert torch.equal(recent, whole.recent(ROW, 64))
