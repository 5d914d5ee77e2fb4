import json

import numpy as np
import pytest

from benchmarks._judges import (
    ClosedVocabularyRecogniser,
    count_word_errors,
    longest_loop_s,
    normal_words,
)
from benchmarks.speech_quality import SENTENCES, read_sentences
from training.lexicon import load_lexicon
from vllm.audio import read_wav
from vllm.entrypoints.bosonai.voices import SHIPPED_PRESETS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, Anna!", "hello anna"),
        ("It's 7 o'clock", "it's seven o'clock"),
        ("15, 40 and 96", "fifteen forty and ninety six"),
        ("in 1970", "in one nine seven zero"),
    ],
)
def test_words_are_compared_without_marks_and_with_numbers_spelt(text, words):
    assert normal_words(text) == words.split()


@pytest.mark.parametrize(
    ("wanted", "heard", "errors"),
    [("a b c", "a b c", 0), ("a b c", "a x c", 1), ("a b c", "b c", 1), ("a", "a b c", 2)],
)
def test_substituted_lost_and_added_words_count(wanted, heard, errors):
    assert count_word_errors(wanted.split(), heard.split()) == errors


def test_a_repeated_pattern_is_a_loop_of_its_whole_length():
    codes = np.array([[1, 2, 3] + [7, 8] * 10 + [4]])
    assert longest_loop_s(codes, frame_rate=10) == pytest.approx(2.0)


def test_speech_without_repetition_has_no_loop():
    assert longest_loop_s(np.arange(100)[None], frame_rate=25) == 0.0


def test_the_sentences_are_in_vocabulary_and_of_the_length_of_a_sentence():
    sentences = read_sentences()
    lexicon = load_lexicon()
    assert len(sentences) == 50
    assert SENTENCES.is_file()
    assert all(set(normal_words(each.text)) <= set(lexicon) for each in sentences)
    assert all(1.0 < each.teacher_s < 6.0 for each in sentences)


def test_the_closed_vocabulary_judge_tells_right_words_from_wrong_ones():
    entry = json.loads((SHIPPED_PRESETS / "config.json").read_text("utf-8"))["en_woman"]
    samples, rate = read_wav((SHIPPED_PRESETS / entry["audio_file"]).read_bytes())
    said = entry["transcript"]
    other = "we keep a cup of tea and nine trains wait before the coffee leaves in the morning"
    judge = ClosedVocabularyRecogniser([said, other])
    heard = judge(samples, rate)
    wanted = normal_words(said)
    assert count_word_errors(wanted, heard) <= 0.2 * len(wanted)
    assert count_word_errors(normal_words(other), heard) > 0.6 * len(wanted)
