"""The vocabulary with its phonemes, as committed."""

from __future__ import annotations

from pathlib import Path

__all__ = ["load_lexicon"]

_LEXICON = Path(__file__).with_name("lexicon.tsv")


def load_lexicon(path: Path = _LEXICON) -> dict[str, str]:
    """Word -> phonemes in our alphabet."""
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return dict(rows)
