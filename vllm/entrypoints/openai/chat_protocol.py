"""Body of chat completions, and what a conversation means to a model that only speaks.

The last user turn is spoken; a user turn and the assistant audio after it are a reference. Reads
no clip and knows no voice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from vllm.entrypoints.openai.protocol import (
    AudioFormat,
    InertField,
    Name,
    SamplingOptions,
    SpeakerVoices,
    Text,
    VoiceReference,
    names_of,
)
from vllm.exceptions import InvalidRequestError

__all__ = [
    "AudioIdReference",
    "AudioOptions",
    "AudioUrl",
    "AudioUrlPart",
    "ChatCompletionRequest",
    "ChatMessage",
    "Conversation",
    "InputAudio",
    "InputAudioPart",
    "ReferenceTurn",
    "StreamOptions",
    "TextPart",
]

_MAX_REFERENCES = 50
_MAX_MESSAGES = 1000
_PARAM = "messages"

# A system text with one of these marks, or with one of these openings, is the model's own form.
_OWN_SYSTEM_FORM = re.compile(
    r"<\|(scene_desc|generation_instruction)_(start|end)\|>|\A\s*(generate|convert|you are)\b",
    re.IGNORECASE,
)


class TextPart(BaseModel):
    """Words of a message."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["text"]
    text: Text


class InputAudio(BaseModel):
    """A clip in the body."""

    model_config = ConfigDict(strict=True, extra="ignore")

    data: str = Field(min_length=1, description="base64, or a data URL")
    format: str | None = Field(None, max_length=32, description="not needed: the clip tells it")


class InputAudioPart(BaseModel):
    """OpenAI's form of a clip."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["input_audio"]
    input_audio: InputAudio

    @property
    def clip(self) -> str:
        return self.input_audio.data


class AudioUrl(BaseModel):
    """A clip elsewhere."""

    model_config = ConfigDict(strict=True, extra="ignore")

    url: str = Field(min_length=1, description="data URL, or a URL where the server allows it")


class AudioUrlPart(BaseModel):
    """vLLM's form of a clip."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["audio_url"]
    audio_url: AudioUrl

    @property
    def clip(self) -> str:
        return self.audio_url.url


class AudioIdReference(BaseModel):
    """The audio of an earlier reply; a whole ``message.audio`` may be sent back."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: Name = Field(min_length=1)


ContentPart = Annotated[TextPart | InputAudioPart | AudioUrlPart, Field(discriminator="type")]


class ChatMessage(BaseModel):
    """One message of the conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ContentPart] | None = None
    audio: AudioIdReference | None = Field(None, description="assistant: an earlier reply")

    @property
    def text(self) -> str:
        """Its words; several text parts are lines."""
        if isinstance(self.content, list):
            texts = [part.text for part in self.content if isinstance(part, TextPart)]
            return "\n".join(texts).strip()
        return (self.content or "").strip()

    @property
    def clips(self) -> list[str]:
        """Its clips: base64, data URLs or URLs."""
        if not isinstance(self.content, list):
            return []
        return [part.clip for part in self.content if not isinstance(part, TextPart)]


class AudioOptions(BaseModel):
    """How the answer sounds."""

    model_config = ConfigDict(strict=True, extra="ignore")

    voice: Name | VoiceReference | None = Field(
        None, description="id or alias of a voice; default: the server's default voice"
    )
    voices: SpeakerVoices
    format: Literal["wav", "aac", "mp3", "flac", "opus", "pcm16"] | None = Field(
        None, description="default: wav; streamed: pcm16"
    )


class StreamOptions(BaseModel):
    """What a streamed answer tells besides."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = Field(None, description="usage in a last chunk without choices")


class ReferenceTurn(NamedTuple):
    """A text and the audio that speaks it: either ``clip`` or ``audio_id``."""

    text: str
    place: str  # of the audio, for messages to the client
    clip: str | None = None  # base64, data URL or URL
    audio_id: str | None = None


class Conversation(NamedTuple):
    """What the messages say."""

    text: str  # to speak
    references: tuple[ReferenceTurn, ...] = ()  # oldest first
    system_prompt: str | None = None  # replaces the whole system text
    scene: str | None = None  # joins the voice's


_NO_TOKENS = "audio replies hold no text tokens"
_NO_TOOLS = "the model speaks and calls nothing"
_NO_FORM = "the reply is speech and follows no grammar"
_ONE_REPLY = "each request has one reply; send several, with a seed each"

_INERT_CHAT: dict[str, InertField] = {
    "n": InertField((1,), _ONE_REPLY),
    "best_of": InertField((1,), _ONE_REPLY),
    "use_beam_search": InertField((False,), _ONE_REPLY),
    "length_penalty": InertField((1,), _ONE_REPLY),
    "logit_bias": InertField(({},), _NO_TOKENS),
    "logprobs": InertField((False,), _NO_TOKENS),
    "top_logprobs": InertField((0,), _NO_TOKENS),
    "prompt_logprobs": InertField((0,), _NO_TOKENS),
    "bad_words": InertField(([],), _NO_TOKENS),
    "allowed_token_ids": InertField(([],), _NO_TOKENS),
    "min_tokens": InertField((0,), "the text decides how long its speech is"),
    "ignore_eos": InertField((False,), "speech ends where its text ends"),
    "echo": InertField((False,), "the transcript is in audio.transcript"),
    "tools": InertField(([],), _NO_TOOLS),
    "tool_choice": InertField(("none", "auto"), _NO_TOOLS),
    "functions": InertField(([],), _NO_TOOLS),
    "function_call": InertField(("none", "auto"), _NO_TOOLS),
    "web_search_options": InertField((), _NO_TOOLS),
    "response_format": InertField(({"type": "text"},), _NO_FORM),
    "structured_outputs": InertField(({},), _NO_FORM),
    "guided_json": InertField((), _NO_FORM),
    "guided_regex": InertField((), _NO_FORM),
    "guided_choice": InertField((), _NO_FORM),
    "guided_grammar": InertField((), _NO_FORM),
    "prediction": InertField((), "speech cannot be predicted from a text"),
}


class ChatCompletionRequest(SamplingOptions):
    """Body of ``POST /v1/chat/completions``."""

    inert: ClassVar[Mapping[str, InertField]] = {**SamplingOptions.inert, **_INERT_CHAT}

    messages: list[ChatMessage] = Field(min_length=1, max_length=_MAX_MESSAGES)
    modalities: list[Literal["text", "audio"]] | None = Field(
        None, description="must hold audio when given; the text is the transcript"
    )
    audio: AudioOptions | None = None
    stream: bool | None = Field(False, description="answer in chunks as the audio is made")
    stream_options: StreamOptions | None = None

    n: Any = None
    best_of: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    prompt_logprobs: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    echo: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    prediction: Any = None

    _conversation: Conversation = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.modalities is not None and "audio" not in self.modalities:
            raise InvalidRequestError(
                f"modalities={self.modalities!r} is not allowed: this model only speaks; "
                "add audio, or leave it out",
                param="modalities",
            )
        given = self.audio.format if self.audio is not None else None
        if self.stream and given not in (None, "pcm16"):
            raise InvalidRequestError(
                f"audio.format={given!r} is not allowed with stream=true; give pcm16, or use "
                "POST /v1/audio/speech, which streams every format",
                param="audio.format",
            )
        self._conversation = _read(self.messages)
        return self

    @property
    def conversation(self) -> Conversation:
        """What the messages say."""
        return self._conversation

    @property
    def voice_name(self) -> str | None:
        voice = self.audio.voice if self.audio is not None else None
        return voice.id if isinstance(voice, VoiceReference) else voice

    @property
    def speaker_voices(self) -> dict[str, str]:
        """Speaker -> id or alias of a voice."""
        return names_of(self.audio.voices if self.audio is not None else None)

    @property
    def audio_format(self) -> AudioFormat:
        """Format of the reply, by the name it has on the speech route."""
        if self.stream:
            return "pcm"
        given = (self.audio.format if self.audio is not None else None) or "wav"
        return "pcm" if given == "pcm16" else given

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def _read(messages: Sequence[ChatMessage]) -> Conversation:
    """The conversation in these messages.

    Raises:
        InvalidRequestError: there is nothing to speak, or a turn fits no rule.
    """
    system = [message for message in messages if message.role in ("system", "developer")]
    _refuse_audio_outside_answers(messages)
    text, references = _read_turns(messages)
    if len(references) > _MAX_REFERENCES:
        raise _refusal(f"messages hold {len(references)} clips; up to {_MAX_REFERENCES} are taken")
    system_text = "\n\n".join(message.text for message in system if message.text)
    if _OWN_SYSTEM_FORM.search(system_text):
        return Conversation(text, tuple(references), system_prompt=system_text)
    return Conversation(text, tuple(references), scene=system_text or None)


def _read_turns(messages: Sequence[ChatMessage]) -> tuple[str, list[ReferenceTurn]]:
    """The text to speak, and the turns before it; messages of one role in a row are one turn."""
    spoken = [(i, m) for i, m in enumerate(messages) if m.role in ("user", "assistant")]
    references: list[ReferenceTurn] = []
    text = ""
    for role, group in groupby(spoken, key=lambda item: item[1].role):
        turn = list(group)
        if role == "user":
            text = "\n".join(message.text for _, message in turn if message.text)
            continue
        references.append(_reference(text, turn))
        text = ""
    if not text:
        raise _refusal("messages end without a user's text; the last user message is spoken")
    return text, references


def _reference(text: str, turn: Sequence[tuple[int, ChatMessage]]) -> ReferenceTurn:
    """The turn that an assistant's audio and the text before it make."""
    index = turn[0][0]
    clips = [(f"messages[{i}]", clip) for i, message in turn for clip in message.clips]
    ids = [(f"messages[{i}]", message.audio.id) for i, message in turn if message.audio]
    if len(clips) + len(ids) != 1:
        found = "no audio" if not clips and not ids else "more than one clip"
        raise _refusal(
            f"messages[{index}] is an assistant's turn with {found}; it needs one clip that "
            "speaks the user's text before it, or must be left out"
        )
    if not text:
        raise _refusal(
            f"messages[{index}] has audio without a transcript; put a user message with the "
            "words of the clip before it"
        )
    if ids:
        return ReferenceTurn(text, ids[0][0], audio_id=ids[0][1])
    return ReferenceTurn(text, clips[0][0], clip=clips[0][1])


def _refuse_audio_outside_answers(messages: Sequence[ChatMessage]) -> None:
    for index, message in enumerate(messages):
        if message.role != "assistant" and (message.clips or message.audio):
            raise _refusal(
                f"messages[{index}] is a {message.role} message with audio, which this model "
                "cannot listen to; to clone a voice, send its words as a user message and the "
                "clip as the assistant message after it"
            )


def _refusal(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=_PARAM)
