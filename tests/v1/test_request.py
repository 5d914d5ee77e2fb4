"""Request: frames recorded, the delay undone, positions counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.outputs import FinishReason
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.messages import EngineCoreRequest
from vllm.v1.request import Request

K = 3


def _request(num_prompt: int = 5) -> Request:
    token_ids = np.arange(num_prompt, dtype=np.int32)
    core_request = EngineCoreRequest(
        request_id="a",
        prompt_token_ids=token_ids.tobytes(),
        sampling_params=SamplingParams(),
        seed=3,
        frame_limit=100,
        limit_reason=FinishReason.LENGTH,
        priority=2,
        arrival_time=4.0,
    )
    return Request.from_core(core_request, np.zeros((0, K), np.int16), np.zeros(0, np.int64))


def _delayed(codes: np.ndarray) -> np.ndarray:
    """Delayed frames [N, K] after the BOS frame, of codes [K, T], by the definition."""
    num_frames = codes.shape[1]
    frames = np.full((num_frames + K, K), 1025, np.int16)
    for k in range(K):
        frames[:k, k] = 1024
        frames[k : k + num_frames, k] = codes[k]
    return frames


def test_message_fields_arrive():
    request = _request()
    assert request.prompt_token_ids.tolist() == [0, 1, 2, 3, 4]
    assert (request.num_prompt_positions, request.num_codebooks) == (5, K)
    assert (request.priority, request.arrival_time, request.frame_limit) == (2, 4.0, 100)


def test_frames_and_audio_positions_must_fit():
    with pytest.raises(AssertionError):
        Request.from_core(
            EngineCoreRequest("a", b"", SamplingParams(), 0, 1, FinishReason.LENGTH),
            np.zeros((2, K), np.int16),
            np.zeros(1, np.int64),
        )


def test_positions_follow_frames():
    request = _request(5)
    request.num_prefilled = 5
    assert (request.num_computed_positions, request.num_slots_needed) == (5, 6)
    request.record_bos_frame(1024)
    assert (request.num_frames, request.num_computed_positions, request.num_slots_needed) == (
        1,
        5,
        6,
    )
    request.append_frame(np.zeros(K, np.int16).tobytes())
    assert (request.num_frames, request.num_computed_positions, request.num_slots_needed) == (
        2,
        6,
        7,
    )


@given(st.integers(1, 12), st.data())
def test_any_part_of_the_codes_is_found_again(num_frames, data):
    codes = np.arange(K * num_frames, dtype=np.int16).reshape(K, num_frames)
    request = _request()
    request.record_bos_frame(1024)
    for frame in _delayed(codes):
        request.append_frame(frame.tobytes())
    start = data.draw(st.integers(0, num_frames))
    stop = data.draw(st.integers(start, num_frames))
    real = request.real_frames(start, stop, num_codes=1024)
    np.testing.assert_array_equal(real, codes[:, start:stop])
    assert real.dtype == np.int16


def test_truncated_frames_are_gone():
    request = _request()
    request.record_bos_frame(9)
    for value in range(4):
        request.append_frame(np.full(K, value, np.int16).tobytes())
    request.truncate_frames(3)
    assert request.delayed_frames(0, 10)[:, 0].tolist() == [9, 0, 1]
