"""What Whisper, DNSMOS and a voice encoder say of the embedded model: ``scripts/judge tests``."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks._judges import FreeRecogniser, Listeners, VoiceJudge, ask
from benchmarks.speech_quality import Sentence, read_sentences, speak, word_error_rate
from vllm.audio import TimeStretch, decode_clip, encode_all, lookup, read_wav
from vllm.entrypoints.bosonai.voices import SHIPPED_PRESETS
from vllm.prompts import SpeechPrompt
from vllm.sampling_params import SamplingParams

pytestmark = [pytest.mark.judged, pytest.mark.slow]

SAME_VOICE = 0.8
OTHER_VOICE = 0.77


@pytest.fixture(scope="module")
def whisper(request: pytest.FixtureRequest) -> FreeRecogniser:
    folder: Path = request.config.getoption("--whisper")
    return FreeRecogniser(folder)


@pytest.fixture(scope="module")
def free_rate(whisper):
    def rate(takes):
        heard = [whisper(take.samples, take.sample_rate) for take in takes]
        return word_error_rate([take.sentence.text for take in takes], heard)

    return rate


def voice_of(clear_takes):
    return np.concatenate([take.samples for take in clear_takes]), clear_takes[0].sample_rate


def test_another_judge_hears_more_of_the_sentence_than_of_another_one(free_rate, takes):
    few = takes[:8]
    wrong = [
        replace(take, sentence=other.sentence) for take, other in zip(few, takes[1:], strict=False)
    ]
    assert free_rate(few) < free_rate(wrong) - 0.1


def test_another_judge_hears_as_much_of_mp3_and_of_other_speeds(free_rate, clear_takes):
    plain = clear_takes[:8]

    def mp3(take):
        data = encode_all(take.samples, lookup("mp3"), take.sample_rate)
        return replace(take, samples=decode_clip(data, sample_rate=take.sample_rate))

    def at(speed, take):
        stretch = TimeStretch(take.sample_rate, speed)
        parts = [stretch.process(take.samples), stretch.finish()]
        return replace(take, samples=np.concatenate(parts))

    limit = free_rate(plain) + 0.15
    for change in (mp3, partial(at, 0.5), partial(at, 2.0)):
        assert free_rate([change(take) for take in plain]) <= limit


def test_the_voice_is_the_teachers(takes, clear_takes):
    clips = [(take.samples, take.sample_rate) for take in takes[:8]]
    likeness = ask(partial(VoiceJudge, *voice_of(clear_takes)), clips)
    assert np.mean(likeness) >= SAME_VOICE


def test_a_long_text_keeps_its_voice(llm, clear_takes):
    sentences = read_sentences()[:6]
    text = Sentence(" ".join(each.text for each in sentences), 20.0)
    take = speak(llm, [text], [0])[0]
    thirds = [(part, take.sample_rate) for part in np.array_split(take.samples, 3)]
    likeness = ask(partial(VoiceJudge, *voice_of(clear_takes)), thirds)
    assert min(likeness) >= SAME_VOICE - 0.05


def shipped_voices():
    """Clips of six voices; en_woman's is much like the teacher's."""
    entries = json.loads((SHIPPED_PRESETS / "config.json").read_text("utf-8"))
    files = {name: entry["audio_file"] for name, entry in entries.items()}
    return {name: read_wav((SHIPPED_PRESETS / file).read_bytes()) for name, file in files.items()}


def test_the_judge_of_voices_tells_a_man_from_the_voice(clear_takes):
    """Without which likeness would mean nothing."""
    assert VoiceJudge(*voice_of(clear_takes))(*shipped_voices()["en_man"]) < OTHER_VOICE


def test_a_clip_is_spoken_on_in_a_voice_nearer_to_it_than_any_other(llm, takes, clear_takes):
    """Of the teacher, whose voice is the only one that the model can speak in."""
    clip = clear_takes[-1]
    judge = VoiceJudge(clip.samples, clip.sample_rate)
    prompts = [
        SpeechPrompt(text=take.sentence.text, ref_audio=clip.samples, ref_text=clip.sentence.text)
        for take in takes[:6]
    ]
    outputs = llm.generate(prompts, SamplingParams(seed=0), use_tqdm=False)
    likeness = [judge(output.audio, output.sample_rate) for output in outputs]
    others = [judge(*clip) for name, clip in shipped_voices().items() if name != "en_woman"]
    assert np.mean(likeness) > max(others) + 0.05


def test_listeners_prefer_the_codec_to_noise(clear_takes):
    judge = Listeners()
    take = clear_takes[0]
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(take.samples)).astype(np.float32)
    assert judge(take.samples, take.sample_rate) > judge(noise, take.sample_rate) + 0.3
