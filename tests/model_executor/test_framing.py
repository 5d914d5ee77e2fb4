"""The delay pattern: worked example, round trips, and increments against the whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.model_executor.framing import DelayFraming, DelayPattern

B, E = 1024, 1025
CODES = np.array([[11, 12, 13], [21, 22, 23], [31, 32, 33]])
DELAYED = [
    [B, B, B],
    [11, B, B],
    [12, 21, B],
    [13, 22, 31],
    [E, 23, 32],
    [E, E, 33],
    [E, E, E],
]


def test_worked_example():
    pattern = DelayPattern(3, B, E)
    delayed = pattern.apply(CODES)
    assert delayed.tolist() == DELAYED
    assert len(delayed) == pattern.num_positions(3)
    assert pattern.undo(delayed, ended=True).tolist() == CODES.tolist()


@pytest.mark.parametrize(("num_frames", "kept"), [(0, 0), (1, 0), (3, 0), (4, 1), (5, 2), (6, 3)])
def test_cut_output_keeps_every_complete_frame(num_frames, kept):
    codes = DelayPattern(3, B, E).undo(np.array(DELAYED)[:num_frames].reshape(-1, 3), ended=False)
    assert codes.tolist() == CODES[:, :kept].tolist()


def test_stray_markers_become_the_largest_code():
    delayed = np.array(DELAYED)
    delayed[2, 0], delayed[3, 1] = B, E
    codes = DelayPattern(3, B, E).undo(delayed, ended=True)
    assert codes[0, 1] == codes[1, 1] == 1023


@given(
    num_frames=st.integers(0, 30),
    ended=st.booleans(),
    sizes=st.lists(st.integers(0, 6), max_size=9),
)
def test_increments_joined_equal_the_whole(num_frames, ended, sizes):
    pattern = DelayPattern(4, 32, 33)
    frames = np.random.default_rng(num_frames).integers(0, 34, (num_frames, 4)).astype(np.int16)
    framing = DelayFraming(pattern)
    cuts = [c for c in np.cumsum(sizes) if c < num_frames]
    pieces = np.split(frames, cuts)
    codes = [framing.push(p, ended=ended and i == len(cuts)) for i, p in enumerate(pieces)]
    joined = np.concatenate(codes, axis=1)
    assert np.array_equal(joined, pattern.undo(frames, ended=ended))
    assert framing.num_frames == joined.shape[1]
