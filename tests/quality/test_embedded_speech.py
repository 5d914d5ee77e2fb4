"""The embedded model is understood: the short form of ``benchmarks.speech_quality``.

What Whisper, DNSMOS and the likeness of the voice say is measured by ``scripts/judge``.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks._judges import (
    ClosedVocabularyRecogniser,
    longest_loop_s,
)
from benchmarks.speech_quality import (
    Take,
    figures_of,
    grammar_sentences,
    read_sentences,
    round_trips,
    speak,
    word_error_rate,
)
from vllm.audio import decode_clip, encode_all, lookup
from vllm.checkpoints.embedded import embedded_checkpoint
from vllm.entrypoints.llm import LLM
from vllm.model_executor.codecs import load_codec
from vllm.prompts import SpeechPrompt
from vllm.sampling_params import SamplingParams

NUM_SENTENCES = 20
# Measured figures are in docs/embedded-model.md; these leave room for other processors' rounding.
MAX_WER = 0.75
MAX_ROUND_TRIP_WER = 0.2


@pytest.fixture(scope="module")
def llm():
    engine = LLM(device="cpu", max_model_len=1024)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def judge():
    return ClosedVocabularyRecogniser(grammar_sentences()[:4000])


@pytest.fixture(scope="module")
def takes(llm) -> list[Take]:
    return speak(llm, read_sentences()[:NUM_SENTENCES], [0])


def rate_of(judge, takes) -> float:
    spoken = [(take.sentence.text, take.samples) for take in takes]
    return word_error_rate(judge, spoken, takes[0].sample_rate)


def test_held_out_sentences_are_understood(judge, takes):
    assert rate_of(judge, takes) <= MAX_WER


def test_the_judge_hears_no_sentence_in_the_speech_of_another(judge, takes):
    texts = [take.sentence.text for take in takes]
    wrong = [(text, take.samples) for text, take in zip(texts[1:], takes, strict=False)]
    assert word_error_rate(judge, wrong, takes[0].sample_rate) > 0.85


def test_all_end_by_themselves_in_the_time_that_the_teacher_takes(takes):
    figures = figures_of(takes)
    assert figures["end of speech"] == 1
    assert 0.8 <= figures["shortest"] <= figures["longest"] <= 1.25
    assert figures["loops"] == 0


def test_the_codec_keeps_words(judge):
    codec = load_codec(embedded_checkpoint() / "codec", device="cpu")
    assert (
        rate_of(judge, round_trips(codec, read_sentences()[:NUM_SENTENCES])) <= MAX_ROUND_TRIP_WER
    )


def understood(judge, takes, change) -> float:
    """Word error rate of the first takes after ``change`` of their samples."""
    rate = takes[0].sample_rate
    changed = [(take.sentence.text, change(take.samples, rate)) for take in takes[:8]]
    return word_error_rate(judge, changed, rate)


def test_words_survive_mp3(judge, takes):
    def compressed(samples, rate):
        return decode_clip(encode_all(samples, lookup("mp3"), rate), sample_rate=rate)

    plain = understood(judge, takes, lambda samples, _: samples)
    assert understood(judge, takes, compressed) <= plain + 0.1


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


def test_a_text_longer_than_any_it_was_trained_on_comes_to_an_end(llm):
    sentences = read_sentences()[:6]
    text = " ".join(sentence.text for sentence in sentences)
    output = llm.generate(text, SamplingParams(seed=0), use_tqdm=False)[0]
    seconds = len(output.audio) / output.sample_rate
    assert 0.75 < seconds / sum(each.teacher_s for each in sentences) < 2.5


def test_equal_seeds_speak_equally_and_others_do_not(llm):
    first, second, other = (
        llm.generate("This is a test.", SamplingParams(seed=seed), use_tqdm=False)[0]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.codes, second.codes)
    assert not np.array_equal(first.codes, other.codes)


def test_a_voice_that_does_not_speak_is_spoken_by_the_default_one(llm):
    asked = llm.generate(
        SpeechPrompt(text="Hello.", voice="de_man"), SamplingParams(seed=3), use_tqdm=False
    )[0]
    default = llm.generate("Hello.", SamplingParams(seed=3), use_tqdm=False)[0]
    np.testing.assert_array_equal(asked.codes, default.codes)
