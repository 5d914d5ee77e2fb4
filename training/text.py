"""What the teacher is given to say: random words, short sentences, and words of a large lexicon.

Most of it is of high entropy on purpose. A model that is trained on sentences alone guesses the
next word from the last ones and never learns to read; nobody can guess a random word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

__all__ = ["FINAL_KINDS", "KINDS", "TextSource", "all_words", "load_vocabulary", "spell"]

_WORDS = Path(__file__).with_name("words.txt")

#: Kind of text -> share of the utterances.
KINDS = {"word": 0.2, "list": 0.35, "sentence": 0.27, "open": 0.18}
#: The same for last, when the model has learnt to read.
FINAL_KINDS = {"word": 0.05, "list": 0.25, "sentence": 0.6, "open": 0.1}

# A template is words and [classes]; a|b draws one of the two.
_TEMPLATES = (
    "[name] [verbs] the [noun] .",
    "[name] [past] a [adjective] [noun] .",
    "[name] and [name] are in [place] .",
    "the [noun] is [adjective] and [adjective] .",
    "the [colour] [noun] is under|near|behind|on|in the [noun] .",
    "is the [noun] in the [noun] ?",
    "where is the [adjective] [noun] ?",
    "please [verb] the [noun] [when] .",
    "the train to [place] leaves at [number] [when] .",
    "[name] is going to [place] on [weekday] .",
    "today is [weekday] , [month] [number] .",
    "the number is [number] , [number] , [number] .",
    "[number] [adjective] [things] cost [number] dollars|euros .",
    "we have [number] [things] and [number] [things] .",
    "[greeting] [name] , how are you today ?",
    "my name is [name] and i live in [place] .",
    "i [verb] the [noun] but you [verb] the [noun] .",
    "it is [adjective] in [place] in [month] .",
    "[name] , can you [verb] the [noun] ?",
    "[greeting] , this is a [noun] .",
    "this is a [adjective] [noun] .",
    "that was a [adjective] [noun] .",
    "what do you think about the [noun] ?",
    "we will [verb] the [noun] [when] .",
    "thank you very much , [name] .",
    "the [ordinal] [noun] was [adjective] .",
    "i do not [verb] the [noun] .",
    "she [past] her [noun] and he [past] his [noun] .",
    "it takes [number] minutes|hours|days to [verb] a [noun] .",
    "good morning|afternoon|evening|night , [name] .",
    "they [past] [number] [things] in [month] .",
    "do you like [colour] or [colour] ?",
)
_WHEN = ("today", "tomorrow", "tonight", "now", "again", "in the morning", "in the evening", "soon")


def load_vocabulary(path: Path = _WORDS) -> dict[str, list[str]]:
    """Class of words -> its words, from ``words.txt``."""
    classes: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name, words = line[1:].split("]", 1)
            classes[name] = words.split()
    return classes


def all_words() -> set[str]:
    """Words of the vocabulary, and those that only the templates have."""
    words = {word for words in load_vocabulary().values() for word in words}
    for template in (*_TEMPLATES, *_WHEN):
        plain = re.sub(r"\[.*?\]", " ", template)
        words.update(re.findall(r"[a-z']+", plain))
    return words


def spell(text: str, lexicon: Mapping[str, str]) -> str:
    """Phonemes of a text whose words are all in ``lexicon``; raises KeyError for another."""
    spoken = " ".join(lexicon[word] if word[0].isalpha() else word for word in text.split())
    for mark in ",.?!":
        spoken = spoken.replace(f" {mark}", mark)
    return spoken


class TextSource:
    """Draws texts, words and marks parted by spaces; equal generators give equal texts."""

    def __init__(
        self,
        rng: np.random.Generator,
        classes: Mapping[str, Sequence[str]],
        rare: Sequence[str],
        *,
        kinds: Mapping[str, float] = KINDS,
    ) -> None:
        """``rare``: words beside the vocabulary, for reading what was never seen."""
        self._kinds = kinds
        self._rng = rng
        self._classes = {**classes, "when": _WHEN, "things": classes["plural"]}
        self._words = sorted({word for words in classes.values() for word in words})
        self._rare = rare

    def draw(self) -> tuple[str, str]:
        """A text and its kind."""
        kind = str(self._rng.choice(list(self._kinds), p=list(self._kinds.values())))
        if kind == "word":
            words = self._some(self._words, 1 if self._rng.random() < 0.6 else 2)
            return self._list(words, 0.3), kind
        if kind == "list":
            return self._list(self._some(self._words, int(self._rng.integers(3, 7))), 0.15), kind
        if kind == "open":
            words = self._some(self._rare, int(self._rng.integers(1, 3)))
            words += self._some(self._words, int(self._rng.integers(0, 3)))
            self._rng.shuffle(words)
            return self._list(words, 0.15), kind
        return self.sentence(), kind

    def _one(self, words: Sequence[str]) -> str:
        return words[int(self._rng.integers(len(words)))]

    def _some(self, words: Sequence[str], count: int) -> list[str]:
        return [self._one(words) for _ in range(count)]

    def _list(self, words: Sequence[str], comma_rate: float) -> str:
        parts = [words[0]]
        for word in words[1:]:
            parts += [",", word] if self._rng.random() < comma_rate else [word]
        return " ".join([*parts, self._one(("." * 8) + "?!")])

    def sentence(self) -> str:
        words = [self._fill(part) for part in self._one(_TEMPLATES).split()]
        return " ".join(words)

    def _fill(self, part: str) -> str:
        if part == "[number]":
            return self._number()
        if part.startswith("["):
            return self._one(self._classes[part[1:-1]])
        return self._one(part.split("|"))

    def _number(self) -> str:
        if self._rng.random() < 0.6:
            return self._one(self._classes["one"])
        tens = self._one(self._classes["ten"])
        if self._rng.random() < 0.4:
            return tens
        return f"{tens} {self._one(self._classes['one'][:9])}"
