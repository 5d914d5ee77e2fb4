"""Request bodies and error bodies in the shape of OpenAI's API."""

from __future__ import annotations

from vllm.entrypoints.openai.chat_protocol import ChatCompletionRequest
from vllm.entrypoints.openai.errors import error_body, error_response
from vllm.entrypoints.openai.protocol import AudioSpeechRequest, VoiceReference

__all__ = [
    "AudioSpeechRequest",
    "ChatCompletionRequest",
    "VoiceReference",
    "error_body",
    "error_response",
]
