"""A checkpoint's ``tokenizer.json``, with text and special tokens kept strictly apart.

Text is never read for special tokens; those are asked for by name. It knows no prompt format.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from vllm.exceptions import CheckpointError

__all__ = ["TextTokenizer"]


class TextTokenizer:
    """Encodes plain text; the spelling of a special token in it is encoded letter by letter."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        _treat_added_tokens_as_special(tokenizer)
        tokenizer.encode_special_tokens = True  # NOTE: means "as ordinary text"

    @classmethod
    def from_folder(cls, folder: Path) -> TextTokenizer:
        """Read ``tokenizer.json`` of a checkpoint folder; raises CheckpointError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"cannot read {path}: {error}") from error
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, taken as ordinary text whatever it spells."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, special tokens spelt out; the inverse of ``encode`` on plain text."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def spell(self, token_id: int) -> str | None:
        """How the tokenizer itself writes a token, such as ``Ġthe``; None if there is none."""
        return self._tokenizer.id_to_token(token_id)

    def token_id(self, name: str) -> int:
        """Id of the token spelt ``name``; raises CheckpointError if there is none."""
        token_id = self._tokenizer.token_to_id(name)
        if token_id is None:
            raise CheckpointError(f"the tokenizer has no token {name!r}")
        return token_id

    def has_token(self, name: str) -> bool:
        """True if there is a token spelt ``name``."""
        return self._tokenizer.token_to_id(name) is not None


def _treat_added_tokens_as_special(tokenizer: Tokenizer) -> None:
    """Mark every added token special: only special ones can be switched off in text."""
    plain = [token for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
    tokenizer.add_special_tokens(
        [
            AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=True,
            )
            for token in plain
        ]
    )
