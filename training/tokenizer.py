"""The exported ``tokenizer.json``: words of the vocabulary to phonemes, other words by rule.

Everything is normaliser rules of the ``tokenizers`` library, so the ordinary loader reads it and
no pronunciation code runs beside the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from training.alphabet import STRESS, SYMBOLS
from training.prompt import FIXED_TEXTS, SPECIAL_TOKENS, TOKEN_ID, UNKNOWN

__all__ = ["build_tokenizer", "write_tokenizer"]

_LETTER = "[a-z']"
_ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = [
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# Spelling -> sound of words outside the vocabulary, tried in this order; a consonant that is
# its own phoneme needs no rule.
_SPELLINGS = (
    ("tion", "ʃən"),
    ("igh", "I"),
    ("tch", "ʧ"),
    ("sch", "ʃ"),
    ("([bdfklmnprstvz])(?=\\1)", ""),
    ("sh", "ʃ"),
    ("ch", "ʧ"),
    ("th", "θ"),
    ("ph", "f"),
    ("ck", "k"),
    ("ng", "ŋ"),
    ("qu", "kw"),
    ("wh", "w"),
    ("kn(?=[aeiou])", "n"),
    ("ee|ea", "ˈE"),
    ("oo", "ˈU"),
    ("ou|ow", "ˈW"),
    ("oi|oy", "ˈY"),
    ("ai|ay|ei|ey", "ˈA"),
    ("au|aw", "ˈɔ"),
    ("ie", "ˈE"),
    ("er|ir|ur", "əɹ"),
    ("ar", "ˈɑɹ"),
    ("or", "ˈɔɹ"),
    ("a(?=[bcdfghklmnpstvz]e(?![a-z]))", "ˈA"),
    ("i(?=[bcdfghklmnpstvz]e(?![a-z]))", "ˈI"),
    ("o(?=[bcdfghklmnpstvz]e(?![a-z]))", "ˈO"),
    ("u(?=[bcdfghklmnpstvz]e(?![a-z]))", "ˈU"),
    ("c(?=[eiy])", "s"),
    ("(?<=[a-zʃʧθ])e(?![a-z])", ""),
    ("y(?=[aeiou])", "J"),
    ("y", "E"),
    ("x", "ks"),
    ("[cq]", "k"),
    ("g", "ɡ"),
    ("j", "ʤ"),
    ("r", "ɹ"),
    ("a", "æ"),
    ("e", "ɛ"),
    ("i", "ɪ"),
    ("o", "ɑ"),
    ("u", "ʌ"),
)


def build_tokenizer(lexicon: Mapping[str, str]) -> Tokenizer:
    """Tokenizer of ``prompt.TOKEN_ID`` that pronounces the words of ``lexicon``."""
    vocabulary = {token: index for token, index in TOKEN_ID.items() if token not in SPECIAL_TOKENS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [*_fixed_texts(), *_letters(), *_numbers(), *_words(lexicon), *_spellings(), *_marks()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(f"\n\n|{STRESS}?[\\s\\S]"), behavior="isolated"
    )
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(folder: Path, lexicon: Mapping[str, str]) -> None:
    build_tokenizer(lexicon).save(str(folder / "tokenizer.json"))


def _rule(pattern: str, content: str) -> normalizers.Normalizer:
    return normalizers.Replace(Regex(pattern), content)


def _fixed_texts() -> list[normalizers.Normalizer]:
    """Phrases of the prompt; each is known by its exact surroundings, which no text to speak has."""
    system, user, assistant, instruction, scene = FIXED_TEXTS
    roles = [_rule(rf"\A{FIXED_TEXTS[role]}\z", role) for role in (system, user, assistant)]
    return [
        _rule(f"[{''.join(FIXED_TEXTS)}{STRESS}]", ""),  # only rules may write these
        *roles,
        _rule(rf"\A{re.escape(FIXED_TEXTS[instruction])}(?=\n\n)", instruction),
        _rule(rf"(?<=\A\n){re.escape(FIXED_TEXTS[scene])}(?=\n\z)", scene),
    ]


def _letters() -> list[normalizers.Normalizer]:
    return [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]


def _numbers() -> list[normalizers.Normalizer]:
    """Digits to words: up to 99 as numbers, longer ones digit by digit."""
    rules = [_rule(rf"(?<!\d)1{at}(?!\d)", word) for at, word in enumerate(_TEENS)]
    for at, word in enumerate(_TENS, start=2):
        rules.append(_rule(rf"(?<!\d){at}0(?!\d)", word))
        rules.append(_rule(rf"(?<!\d){at}(?=[1-9](?!\d))", f"{word} "))
    digits = enumerate(["zero", *_ONES])
    return rules + [_rule(rf"{digit}", f" {word} ") for digit, word in digits]


def _words(lexicon: Mapping[str, str]) -> list[normalizers.Normalizer]:
    return [
        _rule(f"(?<!{_LETTER}){re.escape(word)}(?!{_LETTER})", phonemes)
        for word, phonemes in lexicon.items()
    ]


def _spellings() -> list[normalizers.Normalizer]:
    return [_rule(pattern, content) for pattern, content in _SPELLINGS]


def _marks() -> list[normalizers.Normalizer]:
    """Every mark to one of those that are learnt, none inside a text; then single spaces."""
    spoken = "".join(sorted({*"".join(SYMBOLS), *FIXED_TEXTS}))
    return [
        _rule(r"[;:…—–]", ","),
        _rule(rf"(?<=[^\n{''.join(FIXED_TEXTS)}])\n(?=[^\n])", ", "),
        _rule(r"[-/_]", " "),
        _rule(f"[^{re.escape(spoken)}\n]", ""),
        _rule(r" +", " "),
        _rule(r" ?[,.?!][ ,.?!]*(?=[^ ,.?!\n])", ", "),
        _rule(r"[ ,.!]+(?=[.!]\z)|[ ,.?!]+(?=\?\z)", ""),
        _rule(r"\A[ ,]+| +\z", ""),
    ]
