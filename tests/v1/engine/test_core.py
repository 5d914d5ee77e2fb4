"""Ends, limits, guards and failures of requests in the engine core."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vllm.entrypoints.bosonai.voices import VoiceLibrary
from vllm.exceptions import InvalidRequestError, PromptTooLongError
from vllm.outputs import FinishReason
from vllm.prompts import SpeechPrompt, Voice
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.messages import ClipData, EngineCoreOutput, EngineCoreRequest
from vllm.v1.outputs import EncodedClip

Build = Callable[..., EngineCoreRequest]
LONG_TEXT = "This is the first sentence of a text. " * 12


def num_used_blocks(core: EngineCore) -> float:
    return core._scheduler.stats().kv_cache_usage


def test_max_tokens_counts_delayed_frames(make_driver: Callable[..., Any]) -> None:
    items = make_driver().speak(SpeechPrompt(text="Hello."), SamplingParams(max_tokens=30, seed=1))
    last = items[-1]
    assert last.finish_reason is FinishReason.LENGTH
    assert sum(len(item.delayed_codes) for item in items) == 30
    assert sum(item.codes.shape[1] for item in items) == 22
    assert sum(item.audio.size for item in items) == 22 * 960
    assert (last.usage.completion_tokens, last.usage.audio_tokens) == (30, 22)
    assert last.usage.output_tokens == 30
    assert last.stats.audio_duration_s == pytest.approx(22 / 25)


PINNED = Voice("a", "A", scene="A long hall with a low ceiling.", is_pinned=True)


@pytest.mark.parametrize(
    ("fields", "is_pinned"),
    [
        ({"voice": PINNED}, True),
        ({"voice": PINNED, "text": LONG_TEXT}, True),
        ({"voice": dataclasses.replace(PINNED, is_pinned=False)}, False),
        ({"voice": PINNED, "instructions": "Slowly."}, False),
        ({"voice": PINNED, "system_prompt": "Slowly, in a long hall of stone."}, False),
        ({"voice": PINNED, "ref_audio": np.zeros(960), "ref_text": "a"}, False),
        ({"voices": {"SPEAKER0": PINNED}, "text": "[SPEAKER0] Hi."}, False),
    ],
)
def test_the_beginning_that_all_requests_for_a_voice_share_is_pinned(
    make_driver: Callable[..., Any], fields: dict[str, Any], is_pinned: bool
) -> None:
    driver = make_driver(block_size=8)
    driver.speak(SpeechPrompt(**{"text": "Hi."} | fields), SamplingParams(max_tokens=12, seed=1))
    (prompt, *_) = driver.processor.prompts_of(SpeechPrompt(text="Hi.", voice=PINNED))
    num_blocks = prompt.num_voice_positions // 8
    assert num_blocks > 2
    num_pinned = driver.core._scheduler.stats().num_pinned_blocks
    assert num_pinned == (num_blocks if is_pinned else 0)
    assert 0 < driver.core.info.max_pinned_blocks < driver.core.info.num_kv_blocks


@pytest.mark.parametrize("max_tokens", [1, 2, 8, 9])
def test_few_tokens_end_well(make_driver: Callable[..., Any], max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, seed=1)
    items = make_driver().speak(SpeechPrompt(text="Hi."), params)
    assert items[-1].finish_reason is FinishReason.LENGTH
    assert items[-1].usage.completion_tokens == max_tokens
    assert items[-1].usage.audio_tokens == max(0, max_tokens - 8)


def test_max_tokens_beyond_the_context_is_cut_to_the_room(make_driver: Callable[..., Any]) -> None:
    driver = make_driver(max_model_len=192, text_length_guard=False)
    items = driver.speak(SpeechPrompt(text="Hello."), SamplingParams(max_tokens=10_000, seed=1))
    usage = items[-1].usage
    assert items[-1].finish_reason is FinishReason.LENGTH
    assert usage.prompt_tokens + usage.completion_tokens == 192


def test_a_prompt_without_room_for_audio_is_refused(make_driver: Callable[..., Any]) -> None:
    driver = make_driver(max_model_len=64)
    with pytest.raises(PromptTooLongError, match="positions"):
        driver.speak(SpeechPrompt(text="x" * 200), SamplingParams())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": "x" * 200}, "input"),
        ({"text": "Hi.", "instructions": "slowly " * 40}, "instructions"),
        ({"text": "Hi.", "system_prompt": "slowly " * 40}, "system_prompt"),
        ({"text": "Hi.", "system_prompt": "slowly " * 40, "instructions": "x"}, "system_prompt"),
        ({"text": "Hi.", "ref_audio": np.zeros(24_000 * 8), "ref_text": "a"}, "ref_audio"),
        ({"text": "Hi.", "ref_audio": np.zeros(960), "ref_text": "slowly " * 40}, "ref_audio"),
    ],
)
def test_a_prompt_that_is_too_long_names_its_longest_field(
    make_driver: Callable[..., Any], fields: dict[str, Any], param: str
) -> None:
    driver = make_driver(max_model_len=64)
    with pytest.raises(PromptTooLongError, match=f"^{param} is too long") as caught:
        driver.speak(SpeechPrompt(**fields), SamplingParams())
    assert caught.value.param == param


def test_text_length_guard(make_driver: Callable[..., Any]) -> None:
    items = make_driver().speak(SpeechPrompt(text="Hi."), SamplingParams(seed=1))
    assert items[-1].finish_reason is FinishReason.TEXT_LENGTH
    assert (
        items[-1].usage.audio_tokens == 123
    )  # 4 s and 0.3 s for each of 3 characters, 25 a second


@pytest.mark.parametrize("temperature", [0.1, 0.3, 1.0])
def test_every_temperature_ends_and_says_why(
    make_driver: Callable[..., Any], temperature: float
) -> None:
    params = SamplingParams(seed=1, temperature=temperature)
    last = make_driver().speak(SpeechPrompt(text="Hi."), params)[-1]
    assert last.finish_reason in (FinishReason.STOP, FinishReason.SILENCE, FinishReason.TEXT_LENGTH)
    assert 0 < last.usage.audio_tokens <= 123  # as below


def test_max_audio_guard_holds_over_all_parts(make_driver: Callable[..., Any]) -> None:
    driver = make_driver(max_audio_seconds=2.0)
    items = driver.speak(SpeechPrompt(text=LONG_TEXT), SamplingParams(seed=1))
    assert items[-1].finish_reason is FinishReason.MAX_AUDIO
    assert items[-1].usage.audio_tokens == 50


def test_silence_is_cut_at_a_frame_that_does_not_depend_on_timing(
    make_driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A codec that falls silent after frame 30: 0.4 s later, at frame 40, the audio ends."""
    driver = make_driver(max_silence_seconds=0.4)
    codec = driver.core._executor._worker._codec_runner

    def decode(inputs: Any) -> list[np.ndarray]:
        parts = []
        for _, window in inputs:
            frames = np.arange(window.emit_start, window.emit_stop)
            parts.append(np.repeat(np.where(frames < 30, 0.5, 0.0), 960).astype(np.float32))
        return parts

    monkeypatch.setattr(codec._decoder, "decode", decode)
    items = driver.speak(SpeechPrompt(text="Hello there."), SamplingParams(seed=1))
    assert items[-1].finish_reason is FinishReason.SILENCE
    assert sum(item.audio.size for item in items) == 40 * 960
    assert sum(item.codes.shape[1] for item in items) == 40
    assert items[-1].usage.audio_tokens == 40
    assert items[-1].usage.completion_tokens == 48


def test_raw_prompts_have_no_guards(make_driver: Callable[..., Any]) -> None:
    driver = make_driver(max_audio_seconds=0.5, max_model_len=256)
    opening = driver.processor._builder._open_audio
    prompt = SpeechPrompt(prompt_token_ids=[*range(20, 40), opening])
    items = driver.speak(prompt, SamplingParams(seed=1))
    assert items[-1].finish_reason is FinishReason.LENGTH
    assert items[-1].usage.completion_tokens == 256 - 21


def test_long_text_is_spoken_in_parts_with_their_own_seeds(make_driver: Callable[..., Any]) -> None:
    driver = make_driver(max_audio_seconds=12.0)
    texts = SpeechPrompt(text=LONG_TEXT)
    first = driver.speak(texts, SamplingParams(seed=5, max_tokens=600))
    again = driver.speak(texts, SamplingParams(seed=5, max_tokens=600))
    assert first[-1].stats.num_parts > 1
    joined = [np.concatenate([item.audio for item in items]) for items in (first, again)]
    np.testing.assert_array_equal(*joined)
    assert sum(item.finished for item in first) == 1
    assert joined[0].size == first[-1].usage.audio_tokens * 960


def test_ten_thousand_characters_are_one_stream_of_one_voice(
    make_driver: Callable[..., Any],
) -> None:
    sentence = "Sentence number {:03d} is neither a long one nor a short one. "
    text = "".join(sentence.format(index) for index in range(180))
    assert len(text) > 10_000
    prompt, params = SpeechPrompt(text=text), SamplingParams(seed=5)
    processor = make_driver(max_model_len=2048).processor
    task, again = (processor.process("r", prompt, params) for _ in range(2))
    codes = np.arange(16, dtype=np.int16)  # two frames
    requests = []
    while task.finish_reason is None:
        requests.append(task.next_request())
        output = EngineCoreOutput(
            task.core_id, codes=codes.tobytes(), finish_reason=FinishReason.STOP
        )
        items = task.absorb(output)
    assert items.usage.audio_tokens == 2 * len(requests)
    parts = [part.text for part in task._parts]
    assert len(parts) == len(requests) > 20
    assert all(part.strip().endswith(".") for part in parts)  # cut between sentences only
    assert " ".join(parts).split() == text.split()
    assert len({request.seed for request in requests}) == len(requests)
    assert again.next_request().seed == requests[0].seed
    # No voice was named, so the first part's is kept: its audio is in every later prompt.
    kept = {request.clips[0].codes for request in requests[1:]}
    assert not requests[0].clips
    assert len(kept) == 1


def test_pieces_without_words_are_passed_over(make_driver: Callable[..., Any]) -> None:
    silent = "( ) " * 200
    text = f"A sentence to begin with. {silent} And a sentence to end with."
    items = make_driver().speak(SpeechPrompt(text=text), SamplingParams(seed=1, max_tokens=400))
    assert items[-1].finished
    with pytest.raises(InvalidRequestError, match="nothing to speak"):
        make_driver().speak(SpeechPrompt(text="( )"), SamplingParams(seed=1))


def test_a_drawn_seed_survives_json_in_javascript(make_driver: Callable[..., Any]) -> None:
    processor = make_driver().processor
    prompt = SpeechPrompt(text="Hi.")
    seeds = [processor.process("r", prompt, SamplingParams()).next_request().seed for _ in range(9)]
    assert len(set(seeds)) == 9
    assert all(seed == float(seed) <= 2**53 - 1 for seed in seeds)


def test_the_seed_in_use_is_reported(make_driver: Callable[..., Any]) -> None:
    driver = make_driver()
    drawn = driver.speak(SpeechPrompt(text="Hi."), SamplingParams(max_tokens=20))
    seed = drawn[-1].seed
    again = driver.speak(SpeechPrompt(text="Hi."), SamplingParams(max_tokens=20, seed=seed))
    np.testing.assert_array_equal(
        np.concatenate([item.delayed_codes for item in drawn]),
        np.concatenate([item.delayed_codes for item in again]),
    )
    greedy = driver.speak(SpeechPrompt(text="Hi."), SamplingParams(max_tokens=20, temperature=0.0))
    assert greedy[-1].seed == 0


@pytest.mark.parametrize("num_steps", [0, 1, 2, 30])
def test_abort_frees_the_blocks_within_one_step(
    make_core: Callable[..., EngineCore], build_request: Build, recorder: Any, num_steps: int
) -> None:
    core = make_core(max_num_batched_tokens=32)
    core.add_request(build_request("a", prompt_len=60, frames=300))
    for _ in range(num_steps):
        recorder.take(core.step().outputs)
    core.abort_requests(("a", "unknown"))
    recorder.take(core.step().outputs)
    assert recorder.reasons("a") == [FinishReason.ABORT]
    assert num_used_blocks(core) == 0
    while core.has_work():
        recorder.take(core.step().outputs)
    assert recorder.reasons("a") == [FinishReason.ABORT]


def test_abort_while_a_clip_is_being_encoded(
    make_core: Callable[..., EngineCore], build_request: Build, recorder: Any
) -> None:
    core = make_core()
    base = build_request("a", prompt_len=40)
    samples = np.zeros(960 * 10, np.float32)
    clip = ClipData(start=5, num_frames=10, samples=samples.tobytes())
    core.add_request(EngineCoreRequest(**{**vars(base), "clips": (clip,)}))
    core.abort_requests(("a",), FinishReason.DEADLINE)
    while core.has_work():
        recorder.take(core.step().outputs)
    assert recorder.reasons("a") == [FinishReason.DEADLINE]


def test_a_request_ends_once_however_many_of_its_clips_fail(
    make_core: Callable[..., EngineCore],
    build_request: Build,
    recorder: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = make_core()
    monkeypatch.setattr(core._executor, "encode_clip", lambda key, samples: None)
    clips = tuple(
        ClipData(5 + 10 * index, 1, samples=np.full(960, 0.1 * index, np.float32).tobytes())
        for index in range(2)
    )
    core.add_request(dataclasses.replace(build_request("a", prompt_len=40), clips=clips))
    assert len(core._queued_clips) == 2
    core._take_clips(tuple(EncodedClip(key, None, "broken") for key in sorted(core._queued_clips)))
    recorder.take(core.step().outputs)
    assert not core.has_work()
    assert recorder.reasons("a") == [FinishReason.ERROR]


@pytest.mark.usefixtures("decode_path")
def test_a_failing_step_ends_its_requests_only(
    make_core: Callable[..., EngineCore],
    build_request: Build,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = make_core()
    runner = core._executor._worker._runner
    with monkeypatch.context() as patch:
        fail = lambda rows: (_ for _ in ()).throw(RuntimeError("broken"))  # noqa: E731
        patch.setattr(runner._decoder, "launch", fail)
        failed = run(core, build_request("a"), build_request("b"))
    for name in "ab":
        assert failed.reasons(name) == [FinishReason.ERROR]
        assert "broken" in (failed.parts[name][-1].error or "")
    assert num_used_blocks(core) == 0
    good = run(core, build_request("a", frames=30))
    assert good.reasons("a") == [FinishReason.LENGTH]


def test_a_failing_codec_ends_its_request_only(
    make_core: Callable[..., EngineCore],
    build_request: Build,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = make_core()
    decoder = core._executor._worker._codec_runner._decoder
    decode, calls = decoder.decode, []

    def fail_once(inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no such sound")
        return decode(inputs)

    monkeypatch.setattr(decoder, "decode", fail_once)
    recorder = run(core, *(build_request(name, frames=40) for name in "abc"))
    reasons = sorted(recorder.reasons(name)[0] for name in "abc")
    assert reasons == [FinishReason.ERROR, FinishReason.LENGTH, FinishReason.LENGTH]
    assert num_used_blocks(core) == 0


def test_a_prompt_too_long_for_the_pages_ends_with_an_error(
    make_core: Callable[..., EngineCore], build_request: Build, run: Any
) -> None:
    core = make_core(max_model_len=128)
    recorder = run(core, build_request("big", prompt_len=300), build_request("ok", frames=20))
    assert recorder.reasons("big") == [FinishReason.ERROR]
    assert "300 positions" in (recorder.parts["big"][-1].error or "")
    assert recorder.reasons("ok") == [FinishReason.LENGTH]


@pytest.mark.parametrize("bad_id", [-1, 512])
def test_ids_outside_of_the_table_are_refused(
    make_core: Callable[..., EngineCore], build_request: Build, run: Any, bad_id: int
) -> None:
    core = make_core()
    ids = np.array([3, bad_id, 4], np.int32)
    bad = dataclasses.replace(build_request("bad"), prompt_token_ids=ids.tobytes())
    recorder = run(core, bad, build_request("ok", frames=20))
    assert recorder.reasons("bad") == [FinishReason.ERROR]
    assert "allowed are 0 to 511" in (recorder.parts["bad"][-1].error or "")
    assert recorder.reasons("ok") == [FinishReason.LENGTH]


def test_codes_outside_of_the_table_are_refused(
    make_core: Callable[..., EngineCore], build_request: Build, run: Any
) -> None:
    core = make_core()
    codes = np.full((8, 2), 1026, np.int16)
    clip = ClipData(3, 2, codes=codes.tobytes())
    bad = dataclasses.replace(build_request("bad", prompt_len=30), clips=(clip,))
    recorder = run(core, bad, build_request("ok", frames=20))
    assert recorder.reasons("bad") == [FinishReason.ERROR]
    assert "codes of a clip" in (recorder.parts["bad"][-1].error or "")
    assert recorder.reasons("ok") == [FinishReason.LENGTH]


def test_clips_are_refused_by_a_codec_without_an_encoder(make_driver: Callable[..., Any]) -> None:
    processor = make_driver().processor
    processor._info = dataclasses.replace(processor._info, can_encode=False)
    prompt = SpeechPrompt(text="Hi.", ref_audio=np.zeros(960, np.float32), ref_text="Hi.")
    with pytest.raises(InvalidRequestError, match="no encoder") as caught:
        processor.process("r", prompt, SamplingParams())
    assert caught.value.param == "ref_audio"


def test_inline_clips_need_samples(make_driver: Callable[..., Any]) -> None:
    driver = make_driver()
    for clip in (np.zeros((2, 2), np.float32), np.zeros(960, np.int16), "clip.wav"):
        bad = SpeechPrompt(text="Hi.", ref_audio=clip, ref_text="Hi.")
        with pytest.raises(InvalidRequestError, match="ref_audio"):
            driver.speak(bad, SamplingParams())
    with pytest.raises(InvalidRequestError, match="ref_text is missing"):
        SpeechPrompt(text="Hi.", ref_audio=np.zeros(960, np.float32), ref_text=" ")
    tone = np.sin(np.arange(24_001) / 30).astype(np.float32)
    good = SpeechPrompt(text="Hi.", ref_audio=tone, ref_text="A tone.")
    items = driver.speak(good, SamplingParams(max_tokens=20))
    assert items[-1].usage.audio_tokens == 12


def test_a_scene_prompt_has_no_clip_of_the_default_voice(make_driver: Callable[..., Any]) -> None:
    driver = make_driver()
    driver.processor._voices = VoiceLibrary.for_engine(driver.core.info)
    scene = "<|scene_desc_start|>\nAn old man whispers.\n<|scene_desc_end|>"
    clips = [
        driver.processor.process("a", prompt, SamplingParams()).next_request().clips
        for prompt in (
            SpeechPrompt(text="Hi.", system_prompt=scene),
            SpeechPrompt(text="Hi.", system_prompt=scene, voice="en_man"),
            SpeechPrompt(text="Hi.", system_prompt="Speak."),
        )
    ]
    assert [len(each) for each in clips] == [0, 1, 1]
