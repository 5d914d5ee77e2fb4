from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.audio import TimeStretch
from vllm.exceptions import InvalidRequestError

RATE = 24_000
SPEEDS = [0.25, 0.4, 0.5, 0.8, 1.25, 2.0, 2.7, 4.0]


def stretch(pieces, speed, rate=RATE):
    one = TimeStretch(rate, speed)
    return np.concatenate([*(one.process(piece) for piece in pieces), one.finish()])


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("num_samples", [0, 1, 100, 3_001, 60_000])
def test_length_is_divided_by_speed(speed, num_samples):
    samples = np.full(num_samples, 0.1, np.float32)
    assert len(stretch([samples], speed)) == round(num_samples / speed)


@pytest.mark.parametrize("speed", SPEEDS)
def test_pitch_is_kept(speed):
    t = np.arange(3 * RATE) / RATE
    out = stretch([np.sin(2 * np.pi * 440 * t).astype(np.float32) * 0.5], speed)
    spectrum = np.abs(np.fft.rfft(out * np.hanning(len(out))))
    assert spectrum.argmax() * RATE / len(out) == pytest.approx(440, abs=3)
    assert np.sqrt(np.mean(out**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.1)


@pytest.mark.parametrize("speed", [0.3, 1.25, 3.0])
def test_result_does_not_depend_on_cuts(speed):
    samples = (np.random.default_rng(2).standard_normal(9_000) * 0.1).astype(np.float32)
    whole = stretch([samples], speed)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(0, 9_000), max_size=8))
    def check(cuts):
        np.testing.assert_array_equal(stretch(np.split(samples, sorted(cuts)), speed), whole)

    check()


@pytest.mark.parametrize("speed", SPEEDS)
def test_events_stay_where_they_belong(speed):
    samples = np.zeros(2 * RATE, np.float32)
    t = np.arange(4_800) / RATE
    samples[RATE : RATE + 4_800] = 0.5 * np.sin(2 * np.pi * 300 * t)
    loud = np.flatnonzero(np.abs(stretch([samples], speed)) > 0.1) / RATE
    assert loud[0] == pytest.approx(1.0 / speed, abs=0.1)
    assert loud[-1] == pytest.approx(1.2 / speed, abs=0.1)


@pytest.mark.parametrize("speed", SPEEDS)
def test_output_flows_before_the_end(speed):
    one = TimeStretch(RATE, speed)
    got = len(one.process(np.full(RATE, 0.1, np.float32)))
    assert got / RATE * speed > 0.7  # at most 0.3 s of input held back


def test_speed_one_passes_the_samples_unchanged():
    samples = np.linspace(-1, 1, 1_000, dtype=np.float32)
    np.testing.assert_array_equal(stretch([samples[:300], samples[300:]], 1.0), samples)


@pytest.mark.parametrize("speed", [0.24, 4.01, 0.0, -1.0, float("nan")])
def test_speed_out_of_range_is_refused(speed):
    with pytest.raises(InvalidRequestError, match=r"0\.25 to 4\.0") as error:
        TimeStretch(RATE, speed)
    assert error.value.param == "speed"
