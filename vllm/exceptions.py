"""Every error that this package raises on purpose, each with its HTTP status.

Errors are raised where the fact is known and turned into replies once, at the edge
(``vllm.entrypoints.openai.errors``); nothing here knows HTTP beyond a number.

    HiggsAudioError
    ├── InvalidRequestError        400  a field of one request is wrong
    │   ├── UnknownVoiceError      400
    │   └── PromptTooLongError     400
    ├── ModelNotFoundError         404  the request names a model that is not served
    ├── VoiceNotFoundError         404  there is no such uploaded voice to delete
    ├── VoiceForbiddenError        403  voices that ship with the server cannot be changed
    ├── VoiceConflictError         409  a voice of that id exists, or there is no room for one
    ├── VoiceStoreError            503  the place of uploaded voices cannot be used now
    ├── OverloadedError            503  try again later
    ├── RequestAbortedError        499  the caller gave up
    ├── EngineDeadError            503  the engine process is gone
    ├── EngineError                500  the engine failed this one request
    ├── ConfigError                 -   a flag, field or environment variable is wrong
    └── CheckpointError             -   files do not hold what the configuration promises
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EngineDeadError",
    "EngineError",
    "HiggsAudioError",
    "InvalidRequestError",
    "ModelNotFoundError",
    "OverloadedError",
    "PromptTooLongError",
    "RequestAbortedError",
    "UnknownVoiceError",
    "VoiceConflictError",
    "VoiceForbiddenError",
    "VoiceNotFoundError",
    "VoiceStoreError",
]


class HiggsAudioError(Exception):
    """Root of the tree. ``http_status`` and ``code`` are what a client sees."""

    http_status: int = 500
    code: str = "internal_error"


class InvalidRequestError(HiggsAudioError, ValueError):
    """One request is wrong. The message names the field, the value and what is allowed.

    Attributes:
        param: name of the field at fault, as the client spells it, or None.
    """

    http_status = 400
    code = "invalid_value"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def rename(self, names: Mapping[str, str]) -> None:
        """Call the field at fault by the name that ``names`` (ours -> the client's) has for it."""
        if self.param is None or self.param not in names:
            return
        ours, self.param = self.param, names[self.param]
        message = str(self)
        if message.startswith(f"{ours} "):
            self.args = (self.param + message.removeprefix(ours),)


class UnknownVoiceError(InvalidRequestError):
    """The voice is neither a preset nor an alias."""

    code = "voice_not_found"


class PromptTooLongError(InvalidRequestError):
    """The prompt leaves no room for audio in the context."""

    code = "context_length_exceeded"


class ModelNotFoundError(HiggsAudioError, LookupError):
    """The request names a model that this server does not serve."""

    http_status = 404
    code = "model_not_found"


class VoiceNotFoundError(HiggsAudioError, LookupError):
    """There is no uploaded voice of that id."""

    http_status = 404
    code = "voice_not_found"


class VoiceForbiddenError(HiggsAudioError):
    """The voice ships with the server, or the server takes no uploads."""

    http_status = 403
    code = "voice_not_changeable"


class VoiceConflictError(HiggsAudioError):
    """A voice of that id exists, or there is no room for one more."""

    http_status = 409
    code = "voice_conflict"


class VoiceStoreError(HiggsAudioError):
    """The place of uploaded voices cannot be read or written now."""

    http_status = 503
    code = "voice_store_error"


class OverloadedError(HiggsAudioError):
    """No room for this request now.

    Attributes:
        retry_after_s: seconds after which a new attempt makes sense.
    """

    http_status = 503
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestAbortedError(HiggsAudioError):
    """The request was ended by its caller."""

    http_status = 499
    code = "aborted"


class EngineDeadError(HiggsAudioError):
    """The engine process is gone; every open request ends with this."""

    http_status = 503
    code = "engine_dead"


class EngineError(HiggsAudioError):
    """The engine failed this request and goes on with the others."""

    http_status = 500
    code = "engine_error"


class ConfigError(HiggsAudioError, ValueError):
    """A flag, a configuration field or an environment variable is wrong."""


class CheckpointError(HiggsAudioError):
    """A checkpoint does not hold what its configuration promises."""
