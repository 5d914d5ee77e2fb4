"""The symbols that the language model reads: phonemes, a stressed vowel being one of them.

The letters are those of the teacher's alphabet, except that ``i``, ``j`` and ``u`` are written
``E``, ``J`` and ``U``: lower-case Latin vowels are thus never phonemes, so a rule for unknown
spellings can tell what is still to be read.
"""

from __future__ import annotations

import re

__all__ = ["PUNCTUATION", "SYMBOLS", "SYMBOL_ID", "from_teacher", "split", "to_teacher"]

CONSONANTS = "bdfhklmnpstvwzJTŋɡɹʃʒʤʧθð"
VOWELS = "AEIOUWYæɐɑɔəɛɜɪʊʌᵊᵻ"
STRESS = "ˈ"
PUNCTUATION = " ,.?!"

SYMBOLS: tuple[str, ...] = (
    *PUNCTUATION,
    *CONSONANTS,
    *VOWELS,
    *(STRESS + vowel for vowel in VOWELS),
)
SYMBOL_ID = {symbol: index for index, symbol in enumerate(SYMBOLS)}

_TO_TEACHER = str.maketrans({"E": "i", "J": "j", "U": "u"})
# Secondary stress changes little and would double the vowels once more.
_FROM_TEACHER = str.maketrans({"i": "E", "j": "J", "u": "U", "ɾ": "T", "ˌ": None})
_SYMBOL = re.compile(f"{STRESS}?.")


def from_teacher(phonemes: str) -> str | None:
    """Our spelling of the teacher's phonemes; None if one of them is not ours."""
    ours = phonemes.translate(_FROM_TEACHER)
    return ours if all(symbol in SYMBOL_ID for symbol in split(ours)) else None


def to_teacher(phonemes: str) -> str:
    """The teacher's spelling of our phonemes."""
    return phonemes.translate(_TO_TEACHER)


def split(phonemes: str) -> list[str]:
    """The symbols of a phoneme string, in order."""
    return _SYMBOL.findall(phonemes)
