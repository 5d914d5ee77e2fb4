"""The reference's rewriting of text, rule by rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.prompts import normalize_text
from vllm.prompts.normalize import SOUND_MARKS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello", "Hello."),
        ("Hello,", "Hello,"),
        ("Hello!", "Hello!"),
        ("你好，世界。", "你好, 世界."),
        ("好：吗？是！；", "好:吗?是!;"),
        ("一、二…三—四·五", "一,二...三-四.五."),
        ("【书】《名》", "[书]<名>."),
        ("“a” ‘b’ 「c」", '"a" \'b\' "c"'),
        ("one (two) three（four）", "one two three four."),
        ("20°C or 68°F", "20 degrees Celsius or 68 degrees Fahrenheit."),
        ("Ha [laugh] ha", "Ha <SE>[Laughter]</SE> ha."),
        ("Oh [cough]", "Oh <SE>[Cough]</SE>"),
        ("[music] a", "<SE>[Music]</SE> a."),
        ("[sing start] la [sing end]", "<SE_s>[Singing]</SE_s> la <SE_e>[Singing]</SE_e>"),
        ("[humming start] m", "<SE_s>[Humming]</SE_s> m."),
        ("Ha <SE>[Laughter]</SE> ha", "Ha <SE>[Laughter]</SE> ha."),
        ("<SE_s>[Music]</SE_s> la", "<SE_s>[Music]</SE_s> la."),
        ("a <SE>[Bark]</SE> b", "a [Bark] b."),
        ("  a \t b  \n\n \n c ", "a b\nc."),
        ("[SPEAKER0] Hi\n[SPEAKER1] Ho", "[SPEAKER0] Hi\n[SPEAKER1] Ho."),
        (" \n ", ""),
    ],
)
def test_rule(text, expected):
    assert normalize_text(text) == expected


@pytest.mark.parametrize(
    "text", ["a <SE> b", "a <S<SE>E> b", "a 《SE》 b", "a 《S<SE_s>E》 b", "a </SE_e> b"]
)
def test_sound_marks_of_the_user_are_dropped(text):
    assert normalize_text(text) == "a b."


@given(st.text(alphabet=st.sampled_from("<>/SE_se《》()[laugh] "), max_size=40))
def test_every_sound_mark_in_the_result_is_ours(text):
    others = normalize_text(text).replace("<SE>[Laughter]</SE>", "\0")
    assert not any(mark in others for mark in SOUND_MARKS)
