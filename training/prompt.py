"""The prompt that the engine builds around a text, as ids of the model's small vocabulary.

Fixed phrases are one token each, so a prompt is little longer than its phonemes. That the ids are
those that ``HiggsAudioPromptBuilder`` makes with the exported tokenizer is tested.
"""

from __future__ import annotations

from collections.abc import Sequence

from training.alphabet import SYMBOLS

__all__ = [
    "BETWEEN",
    "FIRST_SYMBOL_ID",
    "FIXED_TEXTS",
    "NUM_TOKENS",
    "PREFIX",
    "SPECIAL_TOKENS",
    "SUFFIX",
    "TOKEN_ID",
    "UNKNOWN",
]

UNKNOWN = "<unk>"
#: Private character that stands for a fixed phrase in the vocabulary -> the phrase.
FIXED_TEXTS = {
    "\ue000": "system",
    "\ue001": "user",
    "\ue002": "assistant",
    "\ue003": "Generate audio following instruction.",
    "\ue004": "Audio is recorded from a quiet room.",
}
# Those of Higgs Audio v2 that its prompts or its configuration name.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|audio_eos|>",
    "<|audio_out_bos|>",
    "<|reserved_special_token_6|>",
    "<|AUDIO|>",
    "<|AUDIO_OUT|>",
    "<|scene_desc_start|>",
    "<|scene_desc_end|>",
)
_TOKENS = (UNKNOWN, "\n", "\n\n", *FIXED_TEXTS, *SYMBOLS, *SPECIAL_TOKENS)
TOKEN_ID = {token: index for index, token in enumerate(_TOKENS)}
NUM_TOKENS = len(_TOKENS)
FIRST_SYMBOL_ID = TOKEN_ID[SYMBOLS[0]]


def _ids(tokens: Sequence[str]) -> tuple[int, ...]:
    return tuple(TOKEN_ID[token] for token in tokens)


def _header(role: str) -> tuple[str, ...]:
    return ("<|start_header_id|>", role, "<|end_header_id|>", "\n\n")


_SYSTEM, _USER, _ASSISTANT, _INSTRUCTION, _SCENE = FIXED_TEXTS
#: Before the text. Its last id is the one that silence before the speech is aligned to.
PREFIX = _ids(
    (
        "<|begin_of_text|>",
        *_header(_SYSTEM),
        *(_INSTRUCTION, "\n\n", "<|scene_desc_start|>", "\n", _SCENE, "\n", "<|scene_desc_end|>"),
        "<|eot_id|>",
        *_header(_USER),
    )
)
#: After the text. Its first id is the one that silence after the speech is aligned to.
SUFFIX = _ids(("<|eot_id|>", *_header(_ASSISTANT), "<|audio_out_bos|>"))
#: Between a reference's frames and the text to speak; before the frames stand PREFIX, what the clip
#: says, and SUFFIX.
BETWEEN = _ids(("<|audio_eos|>", "<|eot_id|>", *_header(_USER)))
