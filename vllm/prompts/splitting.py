"""Cuts long text into parts that are spoken one after another, at sentence ends where possible.

Pure functions over strings. A part is a piece of the input, so no word is lost or said twice; how
parts are joined into one sound is decided elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise

__all__ = [
    "DEFAULT_MAX_CHARS",
    "repeat_speakers",
    "speaker_tags",
    "speech_limit_seconds",
    "split_text",
    "text_width",
]

DEFAULT_MAX_CHARS = 300  # of Latin script: about 20 s of speech

_CJK_WIDTH = 3  # a syllable or word per character
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_CJK_CHARACTER = re.compile(f"[{_CJK}]")

_CLOSERS = "\"'\u2019\u201c\u201d\u00bb\u00ab\u203a)\\]}\u300d\u300f\uff09\u300b\u3011"
# NOTE: possessive, and never tried from within a run, so that time stays linear on any input.
_SENTENCE_END = re.compile(
    rf"(?<![.!?\u2026])[.!?\u2026]++[{_CLOSERS}]*+\s+"
    rf"|[\u3002\uff01\uff1f]++[{_CLOSERS}]*+\s*+"
    rf"|\n\s*+"
)
_CLAUSE_END = re.compile(rf"[,;:\u2013\u2014][{_CLOSERS}]*+\s+|[\uff0c\u3001\uff1b\uff1a]\s*+")
_TAG = r"\[SPEAKER\d+\]"
_NAME_IN_TAG = re.compile(r"\[(SPEAKER\d+)\]")
_TAGS = re.compile(rf"(?:{_TAG}\s*)*")
_TURN_START = re.compile(rf"(?={_TAG})")
_ENDS_WITH_TAG = re.compile(rf"{_TAG}\s*$")
_WORD = re.compile(rf"(?:{_TAG}\s*)*\S+\s*")
_CHARACTER = re.compile(
    rf"(?:{_TAG}\s*)*(?:[{_CJK}]|[^\s{_CJK}]+)[{_CLOSERS}\u3002\uff01\uff1f\uff0c\u3001]*\s*"
)
_LAST_WORD = re.compile(r"[^\s(\[\"'\u201e\u201c\u00ab]*$")
_DOTTED = re.compile(r"\w(\.\w+)*")  # an initial, or letters with dots between them

_ABBREVIATION_LISTS = {
    "en": "dr mr mrs ms prof rev gen sen rep st jr sr vs etc no fig vol dept approx e.g i.e a.m p.m",
    "de": "dr hr fr prof nr str bzw ca usw evtl ggf inkl vgl bd abs art st mio mrd tel z.b d.h u.a",
    "fr": "m mm mme mlle dr prof st ste etc p.ex env vol",
    "es": "sr sra srta dr dra prof ud uds etc p.ej núm pág av",
    "it": "sig sig.ra dott prof ecc pag avv ing",
    "pt": "sr sra dr dra prof etc pág núm av",
}
_ABBREVIATIONS = {
    language: frozenset(f"{words} {_ABBREVIATION_LISTS['en']}".split())
    for language, words in _ABBREVIATION_LISTS.items()
}
_ORDINAL_LANGUAGES = frozenset({"de", "da", "nb", "no", "fi", "cs", "pl", "hu"})


def split_text(
    text: str, *, language: str | None = None, max_chars: int = DEFAULT_MAX_CHARS
) -> list[str]:
    """Parts of ``text``, each as long as the limit allows, in order; empty for blank text.

    Cuts before a speaker tag or after a sentence if it can, else after a clause, between words, or
    between CJK characters. A word is never cut, and a tag stays with the word that follows it.

    Args:
        text: what is spoken; may hold ``[SPEAKERn]`` tags and line breaks.
        language: ISO 639-1 code, for abbreviations and ordinals; None counts as English.
        max_chars: most characters of a part; a CJK character counts three times.
    """
    language = (language or "en").lower().partition("-")[0]
    pieces = partial(_pieces, limit=max_chars)
    cutters = (
        _turns,
        partial(_sentences, language=language),
        _clauses,
        _words,
        _characters,
        pieces,
    )
    return [stripped for part in _pack(text, max_chars, cutters) if (stripped := part.strip())]


def speaker_tags(text: str) -> list[str]:
    """Speakers in the order in which ``text`` names them, without brackets: ``SPEAKER0`` …"""
    return list(dict.fromkeys(_NAME_IN_TAG.findall(text)))


def repeat_speakers(parts: Iterable[str]) -> Iterator[str]:
    """The parts of one text; a part amid a speaker's turn begins with that speaker's tag again."""
    speaker = None
    for part in parts:
        is_continued = speaker is not None and _TURN_START.match(part) is None
        yield f"[{speaker}] {part}" if is_continued else part
        speaker = next(reversed(_NAME_IN_TAG.findall(part)), speaker)


def text_width(text: str) -> int:
    """Characters of ``text``, CJK characters counted three times."""
    return len(text) + (_CJK_WIDTH - 1) * _count_cjk(text)


def speech_limit_seconds(text: str) -> float:
    """Longest plausible duration: 4 s, 0.3 s per character, 1 s per CJK character."""
    text = text.strip()
    num_cjk = _count_cjk(text)
    return 4.0 + 0.3 * (len(text) - num_cjk) + 1.0 * num_cjk


def _count_cjk(text: str) -> int:
    return len(_CJK_CHARACTER.findall(text))


_Cutter = Callable[[str], list[str]]


def _pack(text: str, limit: int, cutters: tuple[_Cutter, ...]) -> list[str]:
    """Pieces of ``text`` joined up to the limit; a piece that is too long is cut more finely."""
    if not cutters or text_width(text.strip()) <= limit:
        return [text]
    parts: list[str] = []
    current, width = "", 0
    for piece in cutters[0](text):
        if current and width + text_width(piece.rstrip()) > limit:
            parts.append(current)
            current, width = "", 0
        if not current:
            *complete, piece = _pack(piece, limit, cutters[1:])
            parts += complete
        current += piece
        width += text_width(piece)
    return [*parts, current]


def _turns(text: str) -> list[str]:
    return _TURN_START.split(text)


def _sentences(text: str, *, language: str) -> list[str]:
    ends = (end for end in _SENTENCE_END.finditer(text) if _ends_sentence(text, end, language))
    return _cut_at(text, (end.end() for end in ends))


def _ends_sentence(text: str, end: re.Match[str], language: str) -> bool:
    """False after an abbreviation, an initial, an ordinal or a tag, or before a small letter."""
    if _ENDS_WITH_TAG.search(text, max(0, end.start() - 20), end.end()):
        return False
    if not end.group().startswith(".") or end.group().startswith("..") or "\n" in end.group():
        return True
    if text[end.end() : end.end() + 1].islower():
        return False
    match = _LAST_WORD.search(text, max(0, end.start() - 20), end.start())
    word = match.group().lower() if match else ""
    if word.isdigit():
        return not (language in _ORDINAL_LANGUAGES and len(word) <= 2)
    known = _ABBREVIATIONS.get(language, _ABBREVIATIONS["en"])
    is_initial = _DOTTED.fullmatch(word) is not None and ("." in word or len(word) == 1)
    return not (is_initial or word in known)


def _clauses(text: str) -> list[str]:
    return _cut_at(text, (end.end() for end in _CLAUSE_END.finditer(text)))


def _words(text: str) -> list[str]:
    return _cut_at(text, (word.end() for word in _WORD.finditer(text)))


def _characters(text: str) -> list[str]:
    return _cut_at(text, (character.end() for character in _CHARACTER.finditer(text)))


def _pieces(text: str, *, limit: int) -> list[str]:
    """Cuts of a word that is longer than a part; the tags before it do not count."""
    tags = _TAGS.match(text)
    start = tags.end() if tags else 0
    if text_width(text[start:].strip()) <= limit:
        return [text]
    size = max(1, limit // _CJK_WIDTH)
    return _cut_at(text, iter(range(start + size, len(text), size)))


def _cut_at(text: str, positions: Iterator[int]) -> list[str]:
    """All of ``text``, cut at ascending positions."""
    cuts = [0, *(position for position in positions if position < len(text)), len(text)]
    return [text[start:stop] for start, stop in pairwise(cuts)]
