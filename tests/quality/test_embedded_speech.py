"""The embedded model is understood, ends, and keeps its voice: the short form of
``benchmarks.speech_quality``.

What Whisper, DNSMOS and the likeness of the voice say is measured by ``scripts/judge``.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks._judges import longest_loop_s
from benchmarks.speech_quality import Sentence, figures_of, read_sentences, speak
from vllm.audio import TimeStretch, decode_clip, encode_all, lookup, read_wav, resample
from vllm.checkpoints.embedded import embedded_checkpoint
from vllm.entrypoints.bosonai.voices import SHIPPED_PRESETS
from vllm.entrypoints.llm import LLM
from vllm.model_executor.codecs import load_codec
from vllm.outputs import FinishReason
from vllm.prompts import SpeechPrompt
from vllm.sampling_params import SamplingParams

pytestmark = pytest.mark.timeout(600)  # recognisers are slow where other work runs

# Measured figures are in docs/embedded-model.md; these leave room for other processors' rounding.
MAX_WER = 0.3
MAX_ROUND_TRIP_WER = 0.2
NUM_CHANGED = 6  # takes that are heard again after a change of their sound
FRAME = 960
QUIET = 0.02  # root mean square of a frame, of full scale
CLOSE, NO_CLICK = 48, 0.01  # samples next to an end of a clip, and what they may reach
PITCH_RATE, PITCH_FRAME = 8000, 320
CLIP_TAKES = 12
MAX_LOSS_BY_SPEED = 0.25  # of words, by a recogniser that knows no such speed


def stretched(samples, rate, speed):
    stretch = TimeStretch(rate, speed)
    return np.concatenate([stretch.process(samples), stretch.finish()])


def as_mp3(samples, rate):
    return decode_clip(encode_all(samples, lookup("mp3"), rate), sample_rate=rate)


def changed(takes, change):
    return [replace(take, samples=change(take.samples, take.sample_rate)) for take in takes]


def pitch(samples, rate):
    """Median fundamental frequency in Hz, by the autocorrelation of voiced frames."""
    narrow = resample(samples, rate, PITCH_RATE)
    frames = narrow[: len(narrow) // PITCH_FRAME * PITCH_FRAME].reshape(-1, PITCH_FRAME)
    frames = frames[np.sqrt((frames**2).mean(axis=1)) > QUIET]
    power = np.abs(np.fft.rfft(frames - frames.mean(axis=1, keepdims=True), 2 * PITCH_FRAME)) ** 2
    likeness = np.fft.irfft(power)[:, :PITCH_FRAME]
    likeness /= likeness[:, :1]
    lags = likeness[:, PITCH_RATE // 350 : PITCH_RATE // 70]
    is_voiced = lags.max(axis=1) > 0.4
    return float(np.median(PITCH_RATE / (lags[is_voiced].argmax(axis=1) + PITCH_RATE // 350)))


def test_held_out_sentences_are_understood(error_rate, takes):
    assert error_rate(takes) <= MAX_WER


def test_the_judge_hears_no_sentence_in_the_speech_of_another(error_rate, takes):
    wrong = [replace(take, sentence=other.sentence) for take, other in itertools.pairwise(takes)]
    assert error_rate(wrong) > 0.85


def test_all_end_by_themselves_in_the_time_that_the_teacher_takes(takes):
    figures = figures_of(takes)
    assert figures["end of speech"] == 1
    assert 0.8 <= figures["shortest"] <= figures["longest"] <= 1.25
    assert figures["loops"] == 0


def test_nothing_follows_the_end_of_speech(takes):
    for take in takes:
        frames = take.samples.reshape(-1, FRAME)
        levels = np.sqrt((frames**2).mean(axis=1))
        loud = np.flatnonzero(levels > QUIET)
        assert len(loud) > 10, take.sentence.text
        assert levels[-1] < QUIET, take.sentence.text  # not cut off in a sound, nor noise
        assert len(levels) - loud[-1] <= 30, take.sentence.text  # of silence: at most 1.2 s


def test_clips_begin_and_end_without_a_click(takes, clear_takes):
    for take in [*takes, *clear_takes]:
        ends = np.concatenate([take.samples[:CLOSE], take.samples[-CLOSE:]])
        assert np.abs(ends).max() < NO_CLICK, take.sentence.text


def test_the_codec_keeps_words(error_rate, clear_takes):
    assert error_rate(clear_takes) <= MAX_ROUND_TRIP_WER


def test_words_survive_mp3(hear, error_rate, takes, clear_takes):
    compressed = changed(clear_takes[:NUM_CHANGED], as_mp3)
    assert error_rate(compressed) <= error_rate(clear_takes[:NUM_CHANGED]) + 0.1
    compressed = changed(takes[:NUM_CHANGED], as_mp3)
    assert error_rate(compressed) <= error_rate(takes[:NUM_CHANGED]) + 0.1


def test_words_survive_twice_the_speed(error_rate, clear_takes):
    plain = clear_takes[:NUM_CHANGED]
    spoken = changed(plain, lambda samples, rate: stretched(samples, rate, 2.0))
    assert error_rate(spoken) <= error_rate(plain) + MAX_LOSS_BY_SPEED


def test_words_survive_half_the_speed(error_rate, clear_takes):
    """Heard at twice that, since the recogniser knows no speech as slow."""
    plain = clear_takes[:NUM_CHANGED]
    slow = changed(plain, lambda samples, rate: stretched(samples, rate, 0.5))
    for before, after in zip(plain, slow, strict=True):
        assert len(after.samples) == pytest.approx(2 * len(before.samples), rel=0.02)
    spoken = changed(slow, lambda samples, rate: stretched(samples, rate, 2.0))
    assert error_rate(spoken) <= error_rate(plain) + MAX_LOSS_BY_SPEED


def test_words_outside_the_vocabulary_are_spoken_and_end(llm):
    outputs = llm.generate(
        ["Hallo, dies ist ein Test.", "Xylophones quietly juggle zwieback."],
        SamplingParams(seed=0),
        use_tqdm=False,
    )
    for output in outputs:
        assert output.finish_reason == "stop"
        assert 1.0 < len(output.audio) / output.sample_rate < 6.0
        assert longest_loop_s(output.codes, frame_rate=25) < 2.0


@pytest.fixture(scope="module")
def long_takes(llm):
    """Texts of four sentences, which are joined from parts."""
    sentences = read_sentences()
    groups = [sentences[first : first + 4] for first in (0, 4, 8)]
    return speak(
        llm,
        [
            Sentence(" ".join(each.text for each in group), sum(each.teacher_s for each in group))
            for group in groups
        ],
        [0],
    )


def test_a_long_text_is_joined_from_parts_that_all_end(llm, long_takes):
    text = long_takes[0].sentence.text
    output = llm.generate(text, SamplingParams(seed=0), use_tqdm=False)[0]
    assert output.finish_reason is FinishReason.STOP  # the worst of all parts
    assert output.stats is not None
    assert output.stats.num_parts == 3
    for take in long_takes:
        assert take.has_ended
        assert 0.8 < take.length_ratio < 1.25


def test_a_long_text_has_the_words_of_all_its_parts(error_rate, takes, long_takes):
    """As many as its sentences have when they are spoken alone."""
    assert error_rate(long_takes) <= error_rate(takes[:12]) + 0.15


def test_a_long_text_keeps_its_voice(long_takes):
    """By its pitch; ``scripts/judge tests`` asks a voice encoder."""
    entry = json.loads((SHIPPED_PRESETS / "config.json").read_text("utf-8"))["en_man"]
    man = pitch(*read_wav((SHIPPED_PRESETS / entry["audio_file"]).read_bytes()))
    for take in long_takes:
        first, *others = (pitch(part, take.sample_rate) for part in np.array_split(take.samples, 3))
        assert others == pytest.approx([first, first], rel=0.2)
        assert man < 0.75 * first


@pytest.mark.parametrize("ramp", [(1,), (3, 5, 7), (200,)])
def test_streaming_changes_no_sample(llm, ramp):
    """Whatever the sizes of the chunks, which here are frames."""
    prompt, params = "We will call the garden tomorrow.", SamplingParams(seed=5)
    expected = llm.generate(prompt, params, use_tqdm=False)[0]
    engine = LLM(device="cpu", max_model_len=1024, stream_ramp=ramp)
    streamed = engine.generate(prompt, params, use_tqdm=False)[0]
    engine.shutdown()
    np.testing.assert_array_equal(streamed.codes, expected.codes)
    np.testing.assert_allclose(streamed.audio, expected.audio, rtol=0, atol=1e-4)


def test_equal_seeds_speak_equally_and_others_do_not(llm):
    first, second, other = (
        llm.generate("This is a test.", SamplingParams(seed=seed), use_tqdm=False)[0]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.codes, second.codes)
    assert not np.array_equal(first.codes, other.codes)


def test_there_is_one_voice_so_all_six_sound_the_same(llm):
    """A matrix of likenesses would be all ones: five voices are spoken by the default one."""
    voices = [each["id"] for each in llm.voices.list()]
    outputs = llm.generate(
        [SpeechPrompt(text="Hello.", voice=voice) for voice in voices],
        SamplingParams(seed=3),
        use_tqdm=False,
    )
    assert len(outputs) == 6
    for output in outputs[1:]:
        np.testing.assert_array_equal(output.codes, outputs[0].codes)


def test_speech_is_understood_after_it_was_encoded(clear_takes, error_rate):
    codec = load_codec(embedded_checkpoint() / "codec", device="cpu")

    def coded(samples, _rate):
        codes = codec.encode(torch.from_numpy(samples)[None])
        return codec.decode(codes)[0].numpy()

    assert error_rate(changed(clear_takes[:NUM_CHANGED], coded)) <= MAX_ROUND_TRIP_WER


def test_a_clip_is_continued_as_clearly_as_the_voice_speaks(llm, takes, clear_takes, error_rate):
    """Of the one voice that it was trained on; another voice comes out near that one."""
    few, clip = takes[:CLIP_TAKES], clear_takes[-1]
    prompts = [
        SpeechPrompt(text=take.sentence.text, ref_audio=clip.samples, ref_text=clip.sentence.text)
        for take in few
    ]
    outputs = llm.generate(prompts, SamplingParams(seed=0), use_tqdm=False)
    spoken = [
        replace(take, samples=output.audio) for take, output in zip(few, outputs, strict=True)
    ]
    assert all(output.finish_reason is FinishReason.STOP for output in outputs)
    assert all(0.6 < take.length_ratio < 1.6 for take in spoken)
    assert error_rate(spoken) <= MAX_WER
