"""Bodies of the replies that are JSON, for the OpenAPI document.

Nothing is checked or converted by them when a reply is sent; the tests hold them against a live
server.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

__all__ = [
    "AudioFigures",
    "AudioStats",
    "AudioUsage",
    "Cancellation",
    "ChatAnswer",
    "ChatAudio",
    "ChatChoice",
    "ChatCompletion",
    "ChatUsage",
    "Connections",
    "Counts",
    "DeletedVoice",
    "Detokenized",
    "ErrorBody",
    "ErrorDetail",
    "GenerateFailure",
    "GenerateResults",
    "GenerateSuccess",
    "HealthReport",
    "Inference",
    "LoadReport",
    "ModelCard",
    "ModelList",
    "PromptId",
    "QueueReport",
    "Removal",
    "SpeechFailure",
    "SpeechResults",
    "SpeechSuccess",
    "StateFields",
    "StatsReport",
    "StatusReport",
    "Tokenized",
    "UnwellReport",
    "VersionReport",
    "VoiceEntry",
    "VoiceList",
    "VoiceObject",
]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every failure, with the older flat keys beside ``error``."""

    error: ErrorDetail
    object: Literal["error"]
    message: str
    type: str
    param: str | None
    code: int
    detail: str


class VersionReport(BaseModel):
    version: str


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[Any]
    description: str | None = None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Counts(BaseModel):
    """Synthesis requests since the start."""

    total_requests: int
    successful_requests: int
    failed_requests: int
    total_generation_time: float
    concurrent_requests: int
    peak_concurrent: int


class StatsReport(Counts):
    avg_generation_time: float


class StateFields(BaseModel):
    """What ``/health`` says in every state."""

    status: Literal["ok", "not_ready", "degraded"]
    vllm_backend: str
    vllm_healthy: bool
    model: str
    mode: str
    stats: Counts
    active_connections: int
    max_concurrent_connections: int
    active_inference: int
    queued_inference: int
    max_inference_slots: int


class HealthReport(StateFields):
    sample_rate: int
    available_voices: list[str]


class UnwellReport(StateFields, ErrorBody):
    """``/health`` while there is no engine: an error, with what is known beside it."""


class Connections(BaseModel):
    active: int
    max: int
    utilization_pct: float


class Inference(BaseModel):
    active: int
    queued: int
    max_slots: int
    utilization_pct: float


class StatusReport(BaseModel):
    """All but ``status`` is left out while the engine is not ready."""

    status: Literal["ready", "at_capacity", "not_ready"]
    can_accept_requests: bool | None = None
    connections: Connections | None = None
    inference: Inference | None = None


class LoadReport(BaseModel):
    server_load: int


class QueueReport(BaseModel):
    pending_requests: list[str]
    queue_depth: int


class Cancellation(BaseModel):
    status: Literal["cancelled"]
    request_id: str
    num_cancelled: int


class VoiceEntry(BaseModel):
    id: str
    voice_id: str
    name: str
    description: str
    language: str
    labels: dict[str, str]
    default: bool
    duration: float
    uploaded: bool


class VoiceList(BaseModel):
    object: Literal["list"]
    voices: list[VoiceEntry]


class VoiceObject(BaseModel):
    """A new voice."""

    id: str
    object: Literal["audio.voice"]
    name: str
    created_at: int
    type: str
    voice_id: str
    language: str
    description: str
    duration: float


class DeletedVoice(BaseModel):
    id: str
    object: Literal["audio.voice.deleted"]
    deleted: bool


class PromptId(BaseModel):
    prompt_id: str


class Removal(BaseModel):
    status: Literal["ok"]


class AudioUsage(BaseModel):
    """Positions of the context, by OpenAI's names for speech and by those for text."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    prompt_tokens: int
    completion_tokens: int
    audio_tokens: int


class AudioStats(BaseModel):
    audio_duration_seconds: float
    processing_time_seconds: float
    realtime_factor: float
    rtf: float
    time_to_first_audio_seconds: float | None


class AudioFigures(BaseModel):
    """What every synthesis ends with."""

    usage: AudioUsage
    stats: AudioStats
    finish_reason: str
    seed: int


class SpeechSuccess(AudioFigures):
    index: int
    status: Literal["success"]
    audio_data: str
    media_type: str


class SpeechFailure(BaseModel):
    index: int
    status: Literal["error"]
    error: ErrorDetail


class SpeechResults(BaseModel):
    results: list[SpeechSuccess | SpeechFailure]
    total: int
    succeeded: int
    failed: int


class GenerateSuccess(AudioFigures):
    index: int
    success: Literal[True]
    audio_base64: str
    generation_time: float


class GenerateFailure(BaseModel):
    index: int
    success: Literal[False]
    error: str


class GenerateResults(BaseModel):
    results: list[GenerateSuccess | GenerateFailure]
    total: int
    successful: int
    failed: int
    mode: str


class ChatAudio(BaseModel):
    id: str
    data: str
    expires_at: int
    transcript: str


class ChatAnswer(BaseModel):
    role: Literal["assistant"]
    content: None
    refusal: None
    audio: ChatAudio | None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    finish_reason: Literal["stop", "length"]
    stop_reason: str
    logprobs: None


class ChatUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    stats: AudioStats


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None
    parts: list[int]


class Detokenized(BaseModel):
    prompt: str
