"""Text and voices into prompts. No torch, no audio decoding."""

from __future__ import annotations

from vllm.prompts.higgs_audio import HiggsAudioPromptBuilder
from vllm.prompts.interface import (
    BuiltPrompt,
    PromptBuilder,
    PromptClip,
    SpeechPrompt,
    SpokenTurn,
    Voice,
    VoiceSource,
)
from vllm.prompts.normalize import normalize_text
from vllm.prompts.splitting import DEFAULT_MAX_CHARS, speech_limit_seconds, split_text
from vllm.prompts.tokenizer import TextTokenizer

__all__ = [
    "DEFAULT_MAX_CHARS",
    "BuiltPrompt",
    "HiggsAudioPromptBuilder",
    "PromptBuilder",
    "PromptClip",
    "SpeechPrompt",
    "SpokenTurn",
    "TextTokenizer",
    "Voice",
    "VoiceSource",
    "normalize_text",
    "speech_limit_seconds",
    "split_text",
]
