import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm.model_executor.codecs import WindowPlan

RAMPS = [(4, 8, 16, 25), (1,), (4,), (25,), (1, 2, 3), (100,)]


def windows_of(plan, total, pushes):
    """Windows that a stream sees whose frames arrive in ``pushes``, the last one final."""
    windows, emitted, available = [], 0, 0
    for index, size in enumerate(pushes):
        available += size
        final = index == len(pushes) - 1
        while (window := plan.next_window(emitted, available, final=final)) is not None:
            windows.append(window)
            emitted = window.emit_stop
    assert available == total
    return windows


def test_the_ramp_sets_the_chunks():
    windows = windows_of(WindowPlan(10), 100, [100])
    assert [window.num_emitted for window in windows] == [4, 8, 16, 25, 25, 22]
    assert [(w.start, w.stop) for w in windows[:4]] == [(0, 14), (0, 22), (2, 38), (18, 63)]


def test_a_chunk_is_due_with_its_context_and_not_before():
    plan = WindowPlan(10)
    assert plan.next_window(0, 13, final=False) is None
    assert plan.next_window(0, 14, final=False).emit_stop == 4
    assert plan.next_window(4, 21, final=False) is None
    assert plan.next_window(4, 22, final=False).emit_stop == 12


def test_nothing_is_left_after_the_last_frame():
    plan = WindowPlan(10)
    assert plan.next_window(0, 0, final=True) is None
    assert plan.next_window(7, 7, final=True) is None


@given(
    pushes=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    ramp=st.sampled_from(RAMPS),
    context=st.sampled_from([0, 3, 10]),
)
def test_windows_do_not_depend_on_how_frames_arrive(pushes, ramp, context):
    plan, total = WindowPlan(context, ramp), sum(pushes)
    assert windows_of(plan, total, pushes) == windows_of(plan, total, [total])


@given(total=st.integers(0, 400), ramp=st.sampled_from(RAMPS), context=st.sampled_from([0, 10]))
def test_windows_cover_every_frame_once_with_full_context(total, ramp, context):
    windows = windows_of(WindowPlan(context, ramp), total, [total])
    emitted = [frame for w in windows for frame in range(w.emit_start, w.emit_stop)]
    assert emitted == list(range(total))
    for window in windows:
        assert window.start == max(0, window.emit_start - context)
        assert window.stop == min(
            total, WindowPlan(context, ramp)._boundary_after(window.emit_start) + context
        )
        assert window.num_emitted > 0


@pytest.mark.parametrize("widens_last", [False, True])
@pytest.mark.parametrize("ramp", RAMPS)
@torch.inference_mode()
def test_streamed_equals_one_shot(codec, ramp, widens_last):
    codes = torch.randint(0, 1024, (1, 8, 87), generator=torch.Generator().manual_seed(2))
    pieces = []
    plan = WindowPlan(codec.context_frames, ramp, widens_last)
    for window in windows_of(plan, 87, [87]):
        samples = codec.decode(codes[..., window.start : window.stop])
        first = (window.emit_start - window.start) * 960
        pieces.append(samples[:, first : first + window.num_emitted * 960])
    torch.testing.assert_close(torch.cat(pieces, 1), codec.decode(codes), rtol=0, atol=1e-5)


@given(
    pushes=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    ramp=st.sampled_from(RAMPS),
    context=st.sampled_from([0, 3, 10]),
)
def test_widened_windows_emit_the_same_with_more_before_it(pushes, ramp, context):
    plain, total = WindowPlan(context, ramp), sum(pushes)
    wide = WindowPlan(context, ramp, widens_last=True)
    found = windows_of(wide, total, pushes)
    for window, other in zip(found, windows_of(plain, total, [total]), strict=True):
        assert (window.emit_start, window.emit_stop) == (other.emit_start, other.emit_stop)
        assert window.stop == other.stop
        assert 0 <= window.start <= other.start
        # What is given up behind the frames that are out is not asked for again.
        assert window.start >= window.emit_start - wide.num_kept
        if total >= max(wide.window_lengths):
            assert window.num_frames in wide.window_lengths
        else:
            assert window.num_frames in (*wide.window_lengths, other.num_frames)


def test_windows_that_every_stream_has_are_known_beforehand():
    plan = WindowPlan(10, (4, 8, 16, 25))
    assert plan.window_lengths == (14, 22, 36, 45)
    assert plan.usual_shapes == (
        *((14, 0, 4), (14, 0, 14)),  # of each length the end of a stream as well
        *((22, 4, 12), (22, 4, 22)),
        *((36, 10, 26), (36, 10, 36)),
        *((45, 10, 35), (45, 10, 45)),
    )
    assert WindowPlan(0, (5,)).usual_shapes == ((5, 0, 5),)
    # Two windows of a length that emit other frames.
    assert WindowPlan(10, (14, 4)).usual_shapes == ((24, 0, 14), (24, 0, 24), (24, 10, 14))


@given(total=st.integers(0, 400), ramp=st.sampled_from([*RAMPS, (14, 4), (4, 20, 2)]))
def test_all_windows_of_long_streams_have_usual_shapes(total, ramp):
    plan = WindowPlan(10, ramp, widens_last=True)
    assume(total >= max(plan.window_lengths))
    for window in windows_of(plan, total, [total]):
        assert any(shape.holds(window.shape) for shape in plan.usual_shapes)
        is_cut_short = window.stop < plan._boundary_after(window.emit_start) + 10
        assert is_cut_short or window.shape in plan.usual_shapes


@settings(max_examples=5)
@given(ramp=st.sampled_from([(), (0,), (4, -1)]))
def test_a_ramp_without_progress_is_refused(ramp):
    with pytest.raises(ValueError, match="ramp"):
        WindowPlan(10, ramp)


def test_negative_context_is_refused():
    with pytest.raises(ValueError, match="context"):
        WindowPlan(-1)
