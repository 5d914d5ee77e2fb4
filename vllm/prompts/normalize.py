"""Rewrites text into the spelling that the model was trained on, as its example script does.

Pure functions over strings: punctuation, units, sound tags and white space. Numbers, dates and
abbreviations are left as they are.
"""

from __future__ import annotations

import re

__all__ = ["SOUND_MARKS", "normalize_text"]

#: Special tokens that enclose a sound: at once, at its start, at its end.
SOUND_MARKS = ("<SE>", "</SE>", "<SE_s>", "</SE_s>", "<SE_e>", "</SE_e>")

_PUNCTUATION = str.maketrans(
    {
        "，": ", ",
        "。": ".",
        "：": ":",
        "；": ";",
        "？": "?",
        "！": "!",
        "（": "(",
        "）": ")",
        "【": "[",
        "】": "]",
        "《": "<",
        "》": ">",
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "「": '"',
        "」": '"',
        "『": '"',
        "』": '"',
        "、": ",",
        "—": "-",
        "…": "...",
        "·": ".",
    }
)
_BRACKETS = str.maketrans("()", "  ")
_UNITS = {"°F": " degrees Fahrenheit", "°C": " degrees Celsius"}
_SOUNDS = {
    "[laugh]": "<SE>[Laughter]</SE>",
    "[music]": "<SE>[Music]</SE>",
    "[applause]": "<SE>[Applause]</SE>",
    "[cheering]": "<SE>[Cheering]</SE>",
    "[cough]": "<SE>[Cough]</SE>",
    "[humming start]": "<SE_s>[Humming]</SE_s>",
    "[humming end]": "<SE_e>[Humming]</SE_e>",
    "[music start]": "<SE_s>[Music]</SE_s>",
    "[music end]": "<SE_e>[Music]</SE_e>",
    "[sing start]": "<SE_s>[Singing]</SE_s>",
    "[sing end]": "<SE_e>[Singing]</SE_e>",
}
_MARK = re.compile("|".join(re.escape(mark) for mark in SOUND_MARKS))
_ENDINGS = (".", "!", "?", ",", ";", '"', "'", "</SE_e>", "</SE>")


def normalize_text(text: str) -> str:
    """Text as the model was trained to read it, one line per paragraph, without blank lines.

    A sound may be written as a tag (``[laugh]``) or as the model itself spells it
    (``<SE>[Laughter]</SE>``); any other mark in ``text`` is dropped, so that marks in the result
    enclose known sounds only. Text of nothing but white space and marks gives an empty string.
    """
    text = text.translate(_PUNCTUATION).translate(_BRACKETS)
    for tag, sound in _SOUNDS.items():
        text = text.replace(sound, tag)
    text = _drop_marks(text)
    for spelling, words in (_UNITS | _SOUNDS).items():
        text = text.replace(spelling, words)
    lines = (" ".join(line.split()) for line in text.splitlines())
    text = "\n".join(line for line in lines if line)
    if not text or text.endswith(_ENDINGS):
        return text
    return text + "."


def _drop_marks(text: str) -> str:
    """Without any sound mark, also none that appears when an inner one is gone."""
    while True:
        text, num_dropped = _MARK.subn("", text)
        if not num_dropped:
            return text
