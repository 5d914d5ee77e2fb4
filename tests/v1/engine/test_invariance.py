"""A request's codes and samples do not depend on what else the engine does."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vllm.kernels import native
from vllm.player import Listener
from vllm.v1.core.row_turns import RowTurns
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.messages import ClipData, EngineCoreRequest

pytestmark = pytest.mark.usefixtures("decode_path")

STEP_S = 0.03
_BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4  # positions x K and V x layers x heads x width x float32


def make_requests(build: Callable[..., EngineCoreRequest], num: int) -> list[EngineCoreRequest]:
    """Requests of all kinds: greedy and drawn, short and long, with equal and different prompts."""
    rng = random.Random(7)
    requests = []
    for index in range(num):
        settings: dict[str, Any] = rng.choice(
            [
                {},
                {"temperature": 0.0},
                {"temperature": 0.7, "top_k": 5},
                {"top_p": 0.8, "ras_window_length": 0},
                {"ras_mode": "block"},
            ]
        )
        requests.append(
            build(
                f"r{index}",
                prompt_len=rng.choice([9, 40, 100, 130]),
                frames=rng.randint(12, 90),
                seed=rng.randrange(2**64),
                first_id=rng.choice([10, 10, 70]),
                **settings,
            )
        )
    return requests


@pytest.fixture
def solo(make_core: Callable[..., EngineCore], run: Any) -> Callable[..., Any]:
    """Runs each request alone in one fresh engine without a prefix cache."""

    def run_alone(
        requests: list[EngineCoreRequest], options: dict[str, Any]
    ) -> dict[str, tuple[bytes, bytes]]:
        core = make_core(enable_prefix_caching=False, **options)
        results = {}
        for request in requests:
            recorder = run(core, request)
            name = request.request_id
            results[name] = (recorder.codes(name), recorder.audio(name))
        return results

    return run_alone


@pytest.mark.parametrize(
    ("options", "block_bytes"),
    [
        ({"cpu_threads": 1}, _BLOCK_BYTES),
        ({"cpu_threads": 2}, _BLOCK_BYTES),
        ({"cpu_threads": 1, "dtype": "bfloat16"}, _BLOCK_BYTES // 2),
    ],
    ids=["1 thread", "2 threads", "bfloat16"],
)
def test_batch_of_16_under_random_load_equals_solo_runs(
    make_core: Callable[..., EngineCore],
    build_request: Callable[..., EngineCoreRequest],
    solo: Callable[..., Any],
    recorder: Any,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    block_bytes: int,
) -> None:
    if "dtype" in options and native.loaded_library() is None:
        pytest.skip("torch computes bfloat16 as it does float32")
    requests = make_requests(build_request, 24)
    expected = solo(requests, options)
    # A third of them has a listener, and the device seems to be saturated.
    monkeypatch.setattr(RowTurns, "_is_worthwhile", lambda _: True)
    num_partial = 0
    # Few pages, so that requests are swapped out; small prefill steps, so that prompts are cut.
    core = make_core(
        max_model_len=256,
        kv_cache_memory=36 * block_bytes,
        max_num_batched_tokens=48,
        **options,
    )
    # A step takes somewhat less than the audio that it makes, however long it takes here.
    now = 0.0
    monkeypatch.setattr(core._scheduler, "_clock", lambda: now)
    rng = random.Random(11)
    waiting, aborted = list(requests), set()
    while waiting or core.has_work():
        if waiting and rng.random() < 0.3:
            request = waiting.pop(0)
            listener = Listener(1.0, now) if rng.random() < 0.3 else None
            core.add_request(replace(request, listener=listener))
        if rng.random() < 0.02 and len(aborted) < 4:
            victim = rng.choice(requests).request_id
            if victim in recorder.parts and not recorder.reasons(victim):
                aborted.add(victim)
                core.abort_requests((victim,))
        outputs = core.step()
        now += STEP_S
        core.check_integrity()
        recorder.take(outputs.outputs)
        num_partial += not core._scheduler._row_turns.is_whole

    assert num_partial > 10, "rows hardly took turns"
    assert outputs.stats.scheduler.num_preemptions > 0, (
        "the pages were not scarce enough to test anything"
    )
    assert outputs.stats.scheduler.prefix_cache_hits > 0, "no prompt was shared"
    for request in requests:
        name = request.request_id
        assert len(recorder.reasons(name)) == 1, name
        codes, audio = recorder.codes(name), recorder.audio(name)
        if name in aborted:
            assert expected[name][0].startswith(codes), name
            assert expected[name][1].startswith(audio), name
        else:
            assert codes == expected[name][0], name
            assert audio == expected[name][1], name


def test_equal_prompts_with_different_clips_do_not_share_pages(
    make_core: Callable[..., EngineCore],
    build_request: Callable[..., EngineCoreRequest],
    run: Any,
) -> None:
    rng = np.random.default_rng(1)
    base = build_request("x", prompt_len=80, frames=20, temperature=0.0, ras_window_length=0)

    def with_clip(name: str, codes: np.ndarray) -> EngineCoreRequest:
        clip = ClipData(start=10, num_frames=40, codes=codes.tobytes())
        fields = {**vars(base), "request_id": name, "clips": (clip,)}
        return EngineCoreRequest(**fields)

    first, second = (rng.integers(0, 1024, (8, 40)).astype(np.int16) for _ in range(2))
    core = make_core()
    results = run(core, with_clip("a", first))
    results.parts |= run(core, with_clip("b", second)).parts
    results.parts |= run(core, with_clip("c", first)).parts
    assert results.codes("a") == results.codes("c")
    assert results.codes("a") != results.codes("b")


def test_a_clip_given_as_samples_is_encoded_once_and_then_remembered(
    make_core: Callable[..., EngineCore],
    build_request: Callable[..., EngineCoreRequest],
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = make_core()
    encoded: list[str] = []
    encode = core._executor.encode_clip
    monkeypatch.setattr(
        core._executor,
        "encode_clip",
        lambda key, samples: (encoded.append(key), encode(key, samples)),
    )
    samples = np.sin(np.arange(960 * 10) / 20).astype(np.float32)
    base = build_request("x", prompt_len=40, frames=20)
    clip = ClipData(start=5, num_frames=10, samples=samples.tobytes())
    requests = [
        EngineCoreRequest(**{**vars(base), "request_id": name, "clips": (clip,)}) for name in "abc"
    ]
    together = run(core, *requests[:2])
    later = run(core, requests[2])
    assert len(encoded) == 1
    assert together.codes("a") == together.codes("b") == later.codes("c")
