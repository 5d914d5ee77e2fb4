"""What a task tells the player of whoever listens while its audio is made."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from vllm.outputs import FinishReason
from vllm.player import VirtualPlayer
from vllm.prompts import BuiltPrompt
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import speech_task
from vllm.v1.engine.messages import EngineCoreOutput, EngineInfo
from vllm.v1.engine.speech_task import Guards, Part, SpeechTask

RATE = 1000
INFO = EngineInfo(
    architecture="fake",
    num_codebooks=2,
    sample_rate=RATE,
    hop_length=100,
    can_encode=True,
    codec_fingerprint="",
    max_model_len=512,
    max_num_seqs=4,
    num_kv_blocks=64,
    max_pinned_blocks=16,
    device="cpu",
    dtype="float32",
    tokenizer_folder="",
    model_folder="",
)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time on the task's clock; to be changed in place."""
    times = [100.0]
    monkeypatch.setattr(speech_task.time, "monotonic", lambda: times[0])
    return times


def make_task(player: VirtualPlayer | None, num_parts: int = 1) -> SpeechTask:
    prompt = BuiltPrompt(np.zeros(4, np.int32), (), ())
    return SpeechTask(
        "r",
        [Part("text", lambda _history: prompt) for _ in range(num_parts)],
        SamplingParams(),
        seed=0,
        guards=Guards(),
        keeps_voice=False,
        info=INFO,
        arrival_time=100.0,
        player=player,
    )


def absorb(task: SpeechTask, seconds: float, reason: FinishReason | None = None) -> None:
    audio = np.zeros(int(seconds * RATE), np.float32).tobytes()
    task.absorb(EngineCoreOutput(task.core_id, audio=audio, finish_reason=reason))


def test_audio_is_played_when_it_comes(now: list[float]) -> None:
    player = VirtualPlayer()
    task = make_task(player)
    task.next_request()
    for now[0], reason in ((105.0, None), (106.5, None), (107.0, FinishReason.STOP)):
        absorb(task, 1.0, reason)
    player.leave(200.0)
    assert player.stalls_s == [0.5]


def test_a_pause_between_two_parts_is_heard(now: list[float]) -> None:
    player = VirtualPlayer()
    task = make_task(player, num_parts=2)
    clock = count(100)
    for _ in range(2):
        task.next_request()
        now[0] = next(clock) * 1.0
        absorb(task, 0.75, FinishReason.STOP)
    assert player.stalls_s == [0.25]


@pytest.mark.parametrize(
    ("reason", "stalls"),
    [
        (FinishReason.STOP, []),
        (FinishReason.LENGTH, []),
        (FinishReason.ABORT, [2.0]),
        (FinishReason.DEADLINE, [2.0]),
        (FinishReason.ERROR, [2.0]),
    ],
)
def test_a_listener_waits_for_audio_unless_it_is_complete(
    now: list[float], reason: FinishReason, stalls: list[float]
) -> None:
    player = VirtualPlayer()
    task = make_task(player)
    task.next_request()
    absorb(task, 1.0)
    now[0] += 3.0
    absorb(task, 0.0, reason)
    player.leave(300.0)
    assert player.stalls_s == stalls


@pytest.mark.parametrize(
    ("num_parts", "reason"), [(2, FinishReason.DEADLINE), (1, FinishReason.STOP)]
)
def test_no_part_follows_once_the_task_is_broken_off(num_parts: int, reason: FinishReason) -> None:
    task = make_task(None, num_parts)
    task.next_request()
    task.break_off(FinishReason.DEADLINE)  # the engine's word of this part's end was on its way
    absorb(task, 0.1, FinishReason.STOP)
    assert task.finish_reason is reason
