"""Text and voices into prompts. No torch, no audio decoding."""

from __future__ import annotations

from vllm.prompts.higgs_audio import HiggsAudioPromptBuilder
from vllm.prompts.interface import (
    CLONED_VOICE,
    SCENE_VOICE,
    BuiltPrompt,
    PromptBuilder,
    PromptClip,
    Speaker,
    SpeechPrompt,
    SpokenTurn,
    Voice,
    VoiceSource,
    is_voice_described,
    resolve_voices,
    voice_id_of,
)
from vllm.prompts.normalize import normalize_text
from vllm.prompts.splitting import DEFAULT_MAX_CHARS, speech_limit_seconds, split_text
from vllm.prompts.tokenizer import TextTokenizer

__all__ = [
    "CLONED_VOICE",
    "DEFAULT_MAX_CHARS",
    "SCENE_VOICE",
    "BuiltPrompt",
    "HiggsAudioPromptBuilder",
    "PromptBuilder",
    "PromptClip",
    "Speaker",
    "SpeechPrompt",
    "SpokenTurn",
    "TextTokenizer",
    "Voice",
    "VoiceSource",
    "is_voice_described",
    "normalize_text",
    "resolve_voices",
    "speech_limit_seconds",
    "split_text",
    "voice_id_of",
]
