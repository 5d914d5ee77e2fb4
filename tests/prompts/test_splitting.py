"""Splitting loses nothing, respects the limit, and cuts where a speaker would breathe."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.prompts import speech_limit_seconds, split_text
from vllm.prompts.splitting import repeat_speakers, speaker_tags, text_width

TEXTS = st.lists(
    st.sampled_from(
        [
            *["word", "Word", "a", "Dr.", "z.B.", "5.", "3.14", "Yes!", "(no?)", "so,", "...", "…"],
            *[
                '"Hi."',
                "你好",
                "好。",
                "吗？”",
                "，",
                "[SPEAKER0]",
                "[SPEAKER12]",
                "\n",
                "\n\n",
                "—",
            ],
            *["longerword", "x" * 30, " ", "  ", "\u3000", "한국", "ひらがな"],
        ]
    ),
    max_size=30,
).map(" ".join)


def without_space(text):
    return re.sub(r"\s+", "", text)


@given(
    TEXTS | st.text(max_size=80), st.integers(1, 60), st.sampled_from([None, "en", "de", "zh-CN"])
)
def test_parts_hold_the_whole_text_within_the_limit(text, max_chars, language):
    parts = split_text(text, language=language, max_chars=max_chars)
    assert without_space("".join(parts)) == without_space(text)
    assert all(part and part == part.strip() for part in parts)
    for part in parts:
        word = re.sub(r"\[SPEAKER\d+\]\s*", "", part)
        word = re.sub(r"^[^\w]+|[^\w]+$", "", word)
        is_one_word = len(word.split()) <= 1
        is_one_character = text_width(word) - len(word) <= 2
        assert text_width(part) <= max_chars or (is_one_word and is_one_character)


TURNS = st.lists(st.sampled_from(["word", "Yes!", "so,", "[SPEAKER0] word", "[SPEAKER12]\nHi."]))


@given(TURNS, st.integers(1, 60))
def test_a_tag_stays_with_the_word_that_follows_it(turns, max_chars):
    parts = split_text(" ".join(turns), max_chars=max_chars)
    assert not any(re.search(r"\[SPEAKER\d+\]$", part) for part in parts)


@pytest.mark.parametrize(
    ("text", "language", "max_chars", "parts"),
    [
        ("One two. Three four.", "en", 30, ["One two. Three four."]),
        ("One two. Three four.", "en", 12, ["One two.", "Three four."]),
        ("He met Dr. Smith. Then J. R. left.", "en", 20, ["He met Dr. Smith.", "Then J. R. left."]),
        ("It is 3.14 now. Fine.", "en", 16, ["It is 3.14 now.", "Fine."]),
        ("See e.g. This. Then that.", "en", 14, ["See e.g. This.", "Then that."]),
        ("Was am 3. Mai war. Gut so.", "de", 18, ["Was am 3. Mai war.", "Gut so."]),
        ("Es ist z. B. Holz. Oder Nr. 5.", "de", 18, ["Es ist z. B. Holz.", "Oder Nr. 5."]),
        ('"Is it?" He ran. (So.) End.', "en", 16, ['"Is it?" He ran.', "(So.) End."]),
        ("First line\nsecond line", "en", 12, ["First line", "second line"]),
        ("今天很好。我们去吧！好吗？”走", "zh", 16, ["今天很好。", "我们去吧！", "好吗？”走"]),
        ("天气很好，我们去散步", "zh", 20, ["天气很好，", "我们去散步"]),
        ("天气很好我们去", "zh", 9, ["天气很", "好我们", "去"]),
        ("When it rains, we stay, all day", "en", 15, ["When it rains,", "we stay,", "all day"]),
        ("one two three", "en", 8, ["one two", "three"]),
        ("[SPEAKER0] Hi. Ho. [SPEAKER1] Yes.", "en", 20, ["[SPEAKER0] Hi. Ho.", "[SPEAKER1] Yes."]),
        ("[SPEAKER0]\nHello you.", "en", 12, ["[SPEAKER0]\nHello", "you."]),
    ],
)
def test_place_of_the_cut(text, language, max_chars, parts):
    assert split_text(text, language=language, max_chars=max_chars) == parts


def test_blank_text_has_no_parts():
    assert split_text(" \n ") == []


@pytest.mark.parametrize(
    "text", [" " * 10**5 + "x", "." * 10**5, "\n" * 10**5 + "a", "[SPEAKER0]" * 10**4, "好" * 10**5]
)
def test_huge_odd_text_is_split_in_linear_time(text):
    """A quadratic search would run for minutes here and meet the suite's time limit."""
    assert without_space("".join(split_text(text))) == text.strip()


@pytest.mark.parametrize(
    ("text", "seconds"), [("", 4.0), (" ab ", 4.6), ("你好", 6.0), ("你好 ab", 6.9)]
)
def test_speech_limit(text, seconds):
    assert speech_limit_seconds(text) == pytest.approx(seconds)


def test_a_word_longer_than_a_part_is_cut():
    parts = split_text("a" * 1000 + " end", max_chars=300)
    assert "".join(parts).replace(" ", "") == "a" * 1000 + "end"
    assert max(map(len, parts)) <= 300


def test_speakers_in_order_of_appearance():
    assert speaker_tags("[SPEAKER2] a [SPEAKER0] b [SPEAKER2] [speaker1] c") == [
        "SPEAKER2",
        "SPEAKER0",
    ]


def test_a_part_amid_a_turn_begins_with_its_speaker():
    parts = ["[SPEAKER0] a [SPEAKER1] b.", "c.", "[SPEAKER0] d", "e"]
    assert list(repeat_speakers(parts)) == [
        "[SPEAKER0] a [SPEAKER1] b.",
        "[SPEAKER1] c.",
        "[SPEAKER0] d",
        "[SPEAKER0] e",
    ]
    assert list(repeat_speakers(["a", "[SPEAKER0] b"])) == ["a", "[SPEAKER0] b"]
