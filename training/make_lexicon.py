"""Writes ``lexicon.tsv``: how the teacher says each word of the vocabulary.

    python -m training.make_lexicon

The file is part of the repository: from it the tokenizer of the exported model is made, so neither
training nor export needs the teacher once the data is there.
"""

from __future__ import annotations

from pathlib import Path

from training.teacher import Teacher
from training.text import all_words

LEXICON = Path(__file__).with_name("lexicon.tsv")
# The teacher's readings of these alone are letters, or a stress that a sentence never has.
_FIXED = {
    "am": "æm",
    "so": "sˈO",
    "live": "lˈɪv",
    "lives": "lˈɪvz",
    "us": "ʌs",
    "mister": "mˈɪstəɹ",
    "misses": "mˈɪsᵻz",
}


def main() -> None:
    teacher = Teacher()
    lines = []
    for word in sorted(all_words()):
        phonemes = _FIXED.get(word) or teacher.pronounce(word)
        if phonemes is None:
            raise SystemExit(f"{word!r} has a phoneme that training/alphabet.py lacks")
        lines.append(f"{word}\t{phonemes}\n")
    LEXICON.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
