"""Request bodies of the speech API, checked and turned into sampling parameters.

Field names are OpenAI's, the fork's and the spellings that other servers use for the same thing.
Knows nothing of voices, files or the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from vllm.config import SpeechDefaults
from vllm.exceptions import InvalidRequestError
from vllm.sampling_params import MAX_RAS_WINDOW, EosRule, RasMode, SamplingParams

__all__ = [
    "MAX_SPEED",
    "MIN_SPEED",
    "AudioFormat",
    "AudioSpeechRequest",
    "InertField",
    "Name",
    "SamplingOptions",
    "SpeakerVoices",
    "Text",
    "VoiceReference",
    "names_of",
]

MIN_SPEED = 0.25
MAX_SPEED = 4.0
_MAX_INT32 = 2**31 - 1
_MAX_SPEAKERS = 16
_MAX_SHOWN = 100  # characters of a refused value that a message repeats

AudioFormat = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]


class InertField(NamedTuple):
    """A field of text generation that audio cannot honour."""

    neutral: tuple[Any, ...]  # values at which it changes nothing; null is another
    reason: str


_REPEATS = "it weighs text tokens, while speech repeats sounds; use ras_window_length"


def _check_unicode(text: str) -> str:
    """JSON can hold half of a surrogate pair, which no tokenizer and no reply can."""
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("the text holds a lone surrogate, which is not valid Unicode")
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
Name = Annotated[Text, Field(max_length=256)]
MaxTokens = Annotated[int | None, Field(default=None, ge=1, le=_MAX_INT32)]
RasWindow = Annotated[int | None, Field(default=None, ge=0, le=MAX_RAS_WINDOW)]
RasRepeat = Annotated[int | None, Field(default=None, ge=0, le=_MAX_INT32)]
Priority = Annotated[
    int | None,
    Field(default=None, ge=-_MAX_INT32, le=_MAX_INT32, description="smaller is sooner; default: 0"),
]
TimeLimit = Annotated[
    float | None,
    Field(default=None, gt=0.0, le=1e9, description="seconds until the request ends as it is"),
]
RequestId = Annotated[
    str | None,
    Field(
        default=None,
        pattern=r"^[\x21-\x7e]{1,128}$",
        description="name for POST /cancel; goes before the X-Request-Id header",
    ),
]
Inert = Annotated[float | None, Field(default=None, description="refused unless neutral")]


class VoiceReference(BaseModel):
    """A voice as an object, OpenAI's form for custom voices."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: Name = Field(min_length=1)


SpeakerVoices = Annotated[
    dict[Name, Name | VoiceReference] | None,
    Field(
        default=None,
        max_length=_MAX_SPEAKERS,
        description='voices of the speakers of the text, as {"SPEAKER0": "en_man"}',
    ),
]


def names_of(voices: Mapping[str, str | VoiceReference] | None) -> dict[str, str]:
    """Speaker -> id or alias of a voice."""
    return {
        speaker: voice.id if isinstance(voice, VoiceReference) else voice
        for speaker, voice in (voices or {}).items()
    }


class SamplingOptions(BaseModel):
    """What every body that asks for speech may say about sampling and text.

    Unknown fields are accepted, since clients send many; the server logs their names. Null means
    "not given", except in the RAS fields, where it switches RAS off. A subclass adds to
    ``spellings`` and ``inert``.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    # canonical field -> every spelling of it
    spellings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "max_tokens": ("max_tokens", "max_new_tokens", "max_completion_tokens"),
        "ras_window_length": ("ras_window_length", "ras_win_len"),
        "ras_max_num_repeat": ("ras_max_num_repeat", "ras_win_max_num_repeat"),
    }
    inert: ClassVar[Mapping[str, InertField]] = {
        "min_p": InertField((0,), "use top_p or top_k"),
        "presence_penalty": InertField((0,), _REPEATS),
        "frequency_penalty": InertField((0,), _REPEATS),
        "repetition_penalty": InertField((1,), _REPEATS),
    }

    model: Name | None = Field(None, description="a served model name; default: the first one")
    temperature: float | None = Field(None, ge=0.0, le=100.0, description="0 is greedy")
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=-1, le=_MAX_INT32, description="-1 or 0 keeps all codes")
    seed: int | None = Field(None, ge=0, le=2**64 - 1, description="drawn at random when absent")
    max_tokens: MaxTokens
    max_new_tokens: MaxTokens
    max_completion_tokens: MaxTokens
    stop: Text | list[Text] | None = Field(None, description="accepted; audio holds no text")
    ras_window_length: RasWindow
    ras_win_len: RasWindow
    ras_max_num_repeat: RasRepeat
    ras_win_max_num_repeat: RasRepeat
    ras_mode: RasMode | None = None
    eos_rule: EosRule | None = None
    min_p: Inert
    presence_penalty: Inert
    frequency_penalty: Inert
    repetition_penalty: Inert
    language: str | None = Field(
        None, max_length=35, description="ISO 639-1 code, for sentence splitting"
    )
    normalize: bool | None = Field(True, description="rewrite punctuation, units and sound tags")
    priority: Priority
    timeout_s: TimeLimit
    request_id: RequestId

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        for name, field in self.inert.items():
            self._refuse_unless_neutral(name, field)
        for name in self.spellings:
            self._check_spellings(name)
        return self

    def _refuse_unless_neutral(self, name: str, field: InertField) -> None:
        value = getattr(self, name)
        if value is None or any(_is_same(value, neutral) for neutral in field.neutral):
            return
        shown = repr(value)[:_MAX_SHOWN]
        raise InvalidRequestError(
            f"{name}={shown} makes no sense for audio: {field.reason}; leave it out", param=name
        )

    def _check_spellings(self, name: str) -> None:
        given = [(key, getattr(self, key)) for key in self.spellings[name] if self._was_given(key)]
        for key, value in given[1:]:
            first_key, first_value = given[0]
            if value != first_value:
                raise InvalidRequestError(
                    f"{first_key} and {key} name the same thing but differ; give one of them",
                    param=key,
                )

    def _was_given(self, key: str) -> bool:
        return key in self.model_fields_set and (
            getattr(self, key) is not None or key.startswith("ras_")
        )

    @property
    def spelt(self) -> dict[str, str]:
        """Field -> how the client spelt it, where that is another spelling."""
        given = {
            name: next((key for key in keys if self._was_given(key)), name)
            for name, keys in self.spellings.items()
        }
        return {name: key for name, key in given.items() if key != name}

    def _value_of(self, name: str) -> Any:
        """Value of a field under whichever spelling it was given."""
        for key in self.spellings[name]:
            if self._was_given(key):
                return getattr(self, key)
        return None

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """Names of the fields that have no meaning here."""
        return tuple(sorted(self.model_extra or ()))

    def to_sampling_params(self, defaults: SpeechDefaults) -> SamplingParams:
        """Sampling of this request: its own values over the server's over the model's.

        RAS is off when 0 or null is given in either of its fields; a missing partner takes the
        server's value.

        Raises:
            InvalidRequestError: a value is out of range; ``param`` names the field.
        """
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "max_tokens": self._value_of("max_tokens"),
            "eos_rule": self.eos_rule,
        }
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            ras_window_length=self._ras_value("ras_window_length", defaults.ras_window_length),
            ras_max_num_repeat=self._ras_value("ras_max_num_repeat", defaults.ras_max_num_repeat),
            ras_mode=self.ras_mode or defaults.ras_mode,
            stop=stop,
            **{name: value for name, value in given.items() if value is not None},
        )

    def _ras_value(self, name: str, server_value: int) -> int:
        if not any(self._was_given(key) for key in self.spellings[name]):
            return server_value
        return self._value_of(name) or 0


class AudioSpeechRequest(SamplingOptions):
    """Body of ``POST /v1/audio/speech``."""

    spellings = {
        **SamplingOptions.spellings,
        "ref_audio": ("ref_audio", "reference_audio_base64"),
        "ref_text": ("ref_text", "reference_text"),
    }

    input: Text = Field(description="text to speak")
    voice: Name | VoiceReference | None = Field(
        None, description="id or alias of a voice; default: the server's default voice"
    )
    voices: SpeakerVoices
    response_format: AudioFormat | None = Field("mp3", description="null is mp3")
    speed: float | None = Field(
        1.0, ge=MIN_SPEED, le=MAX_SPEED, description="speaking rate, pitch kept; null is 1.0"
    )
    stream: bool | None = Field(
        None, description="false: one complete file with its true length; default: streamed"
    )
    stream_format: Literal["audio", "sse"] | None = Field("audio", description="sse: JSON events")
    instructions: Text | None = Field(None, description="how to speak; joins the voice's scene")
    system_prompt: Text | None = Field(None, description="replaces the whole system text")
    ref_audio: str | None = Field(
        None, description="clip to clone: data URL, base64, or a URL where the server allows it"
    )
    reference_audio_base64: str | None = None
    ref_text: Text | None = Field(None, description="transcript of ref_audio")
    reference_text: Text | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.input.strip():
            raise InvalidRequestError("input is empty; give the text to speak", param="input")
        if self.stream is False and self.stream_format == "sse":
            raise InvalidRequestError(
                "stream_format='sse' is not allowed with stream=false; leave stream out",
                param="stream_format",
            )
        if self.reference_audio and not (self.reference_transcript or "").strip():
            raise InvalidRequestError(
                "ref_text is missing; give the transcript of ref_audio", param="ref_text"
            )
        if self.reference_transcript and not self.reference_audio:
            raise InvalidRequestError(
                "ref_audio is missing; ref_text is its transcript", param="ref_audio"
            )
        return self

    @property
    def voice_name(self) -> str | None:
        return self.voice.id if isinstance(self.voice, VoiceReference) else self.voice

    @property
    def speaker_voices(self) -> dict[str, str]:
        """Speaker -> id or alias of a voice."""
        return names_of(self.voices)

    @property
    def audio_format(self) -> AudioFormat:
        return self.response_format or "mp3"

    @property
    def speed_factor(self) -> float:
        return 1.0 if self.speed is None else self.speed

    @property
    def wants_sse(self) -> bool:
        return self.stream_format == "sse"

    @property
    def wants_stream(self) -> bool:
        return self.stream is not False

    @property
    def reference_audio(self) -> str | None:
        value: str | None = self._value_of("ref_audio")
        return value

    @property
    def reference_transcript(self) -> str | None:
        value: str | None = self._value_of("ref_text")
        return value


def _is_same(value: Any, neutral: Any) -> bool:
    """Equality that tells 1 from true."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)
