"""Writes a small tokenizer with the special tokens and chat template of Higgs Audio v2.

Any text encodes, byte by byte where no merge applies; which ids a model uses is read back from
the table returned here.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["PUBLISHED_FIRST_SPECIAL_ID", "SPECIAL_TOKENS", "make_tokenizer"]

PUBLISHED_FIRST_SPECIAL_ID = 128000
_NUM_BPE_TOKENS = 320

# In the order of their published ids, the first being 128000.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|audio_out_bos|>",
    "<|reserved_special_token_6|>",
    "<|AUDIO|>",
    "<|AUDIO_OUT|>",
    "<|recipient|>",
    "<|scene_desc_start|>",
    "<|scene_desc_end|>",
    "<|generation_instruction_start|>",
    "<|generation_instruction_end|>",
    "<SE>",
    "</SE>",
    "<SE_s>",
    "</SE_s>",
    "<SE_e>",
    "</SE_e>",
)

_TRAINING_TEXT = (
    "The quick brown fox jumps over the lazy dog, and the audio is recorded from a quiet room.",
    "Hallo, dies ist ein Test. Generate audio following instruction. SPEAKER0: SPEAKER1:",
    "system user assistant and there is the one that was heard in the morning of the day",
)

# Renders what the published template renders.
_CHAT_TEMPLATE = """\
{%- macro header(role) -%}
{{ "<|start_header_id|>" ~ role ~ "<|end_header_id|>\\n\\n" }}
{%- endmacro -%}
{%- macro clip() -%}
{{ "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>" }}
{%- endmacro -%}
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content | trim }}
{%- else -%}
{%- for part in content if part.type == "text" -%}{{ part.text | trim }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro scene_of(parts) -%}
{%- for part in parts -%}
{%- if part.type == "text" -%}
{{ part.text | trim }}
{%- if loop.first and not loop.last -%}{{ "\\n\\n" }}
{%- elif not loop.last and loop.nextitem.type != "audio" -%}{{ "\\n" }}
{%- endif -%}
{%- else -%}
{{ " " ~ clip() }}{%- if not loop.last -%}{{ "\\n" }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
{%- if not messages or messages[0].role != "system" -%}
{{ raise_exception("the first message must be the system message") }}
{%- endif -%}
{%- set first = messages[0].content -%}
{{ "<|begin_of_text|>" ~ header("system") }}
{%- if first is string -%}{{ first | trim }}
{%- else -%}
{%- set texts = first | selectattr("type", "equalto", "text") | list -%}
{{ texts[0].text | trim }}
{%- endif -%}
{%- set rest = messages[1:] -%}
{%- if rest and rest[0].role == "scene" -%}
{%- set scene = rest[0].content -%}
{{ "\\n\\n<|scene_desc_start|>\\n" }}
{%- if scene is string -%}{{ scene | trim }}{%- else -%}{{ scene_of(scene) }}{%- endif -%}
{{ "\\n<|scene_desc_end|>" }}
{%- set rest = rest[1:] -%}
{%- endif -%}
{{ "<|eot_id|>" }}
{%- for message in rest -%}
{{ header(message.role) }}
{%- if message.role == "assistant" -%}
{%- if message.content is string or message.content | length != 1
      or message.content[0].type != "audio" -%}
{{ raise_exception("an assistant message must be one audio item") }}
{%- endif -%}
{{ clip() }}
{%- else -%}{{ text_of(message.content) }}
{%- endif -%}
{{ "<|eot_id|>" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ header("assistant") ~ "<|audio_out_bos|>" }}
{%- endif -%}
"""


def make_tokenizer(folder: Path, *, first_special_id: int | None = None) -> dict[str, int]:
    """Write ``tokenizer.json``, its configuration and the chat template into ``folder``.

    Args:
        folder: exists already.
        first_special_id: id of ``<|begin_of_text|>``; the gap below it is filled with reserved
            tokens. Default: right after the byte-pair tokens.

    Returns:
        Special token -> id, and under ``"vocab_size"`` the number of ids.
    """
    tokenizer = _train()
    missing = (first_special_id or 0) - tokenizer.get_vocab_size()
    if missing > 0:
        tokenizer.add_tokens([f"<|filler_{index}|>" for index in range(missing)])
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|eot_id|>",
                "pad_token": "<|end_of_text|>",
                "model_max_length": 131072,
                "clean_up_tokenization_spaces": False,
                "model_input_names": ["input_ids", "attention_mask"],
            },
            indent=2,
        ),
        encoding="utf-8",
    )
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    ids = {each: _id_of(tokenizer, each) for each in SPECIAL_TOKENS}
    return ids | {"vocab_size": tokenizer.get_vocab_size()}


def _train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_NUM_BPE_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    return tokenizer


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return int(found)
