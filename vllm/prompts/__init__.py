"""Text and voices into prompts. No torch, no audio decoding."""

from __future__ import annotations

from vllm.prompts.interface import (
    BuiltPrompt,
    PromptBuilder,
    PromptClip,
    SpeechPrompt,
    SpokenTurn,
    Voice,
    VoiceSource,
)

__all__ = [
    "BuiltPrompt",
    "PromptBuilder",
    "PromptClip",
    "SpeechPrompt",
    "SpokenTurn",
    "Voice",
    "VoiceSource",
]
