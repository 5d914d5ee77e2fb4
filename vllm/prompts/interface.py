"""What a caller asks to be spoken, what a voice is, and what a prompt builder makes of both.

Plain values with numpy arrays: no tokenizer, no template and no torch here. The builders beside
this file turn them into ids and audio slots.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vllm.exceptions import InvalidRequestError
from vllm.prompts.splitting import DEFAULT_MAX_CHARS, speaker_tags

if TYPE_CHECKING:
    from vllm.prompts.tokenizer import TextTokenizer

__all__ = [
    "CLONED_VOICE",
    "SCENE_VOICE",
    "BuiltPrompt",
    "PromptBuilder",
    "PromptClip",
    "Speaker",
    "SpeechPrompt",
    "SpokenTurn",
    "Voice",
    "VoiceSource",
    "is_voice_described",
    "resolve_voices",
    "voice_id_of",
]

_SPEAKER = re.compile(r"SPEAKER\d{1,3}")


@dataclass(frozen=True, eq=False)
class PromptClip:
    """Reference audio in a prompt: codes, or samples that the engine will encode.

    Exactly one of both is given. ``samples`` is float32 [num_frames * hop_length], mono, at the
    codec's rate; ``codes`` is int16 [num_codebooks, num_frames] without delay.
    """

    num_frames: int
    samples: NDArray[np.float32] | None = None
    codes: NDArray[np.int16] | None = None

    def __post_init__(self) -> None:
        assert (self.samples is None) != (self.codes is None), "give samples or codes"


@dataclass(frozen=True, eq=False)
class Voice:
    """A voice: a reference clip with its transcript and/or a description of the scene."""

    voice_id: str
    name: str
    language: str = "en"  # ISO 639-1
    description: str = ""
    transcript: str | None = None
    clip: PromptClip | None = None
    system_prompt: str | None = None  # replaces the whole system text
    scene: str | None = None  # fills the scene block
    is_default: bool = False
    speaks: bool = True  # False: listed, but the model cannot speak it
    is_trained: bool = False  # the model was trained on it and keeps it without any context
    is_pinned: bool = False  # the cache keeps its prompt before those of others
    max_chars: int = DEFAULT_MAX_CHARS  # of the parts in which it speaks a text
    asked_for: str = ""  # id of the voice that this one stands in for, since it does not speak
    duration_s: float = 0.0  # of the clip
    labels: dict[str, str] = field(default_factory=dict)


class Speaker(NamedTuple):
    """A voice under the name that calls it in a text: ``SPEAKER0`` for the tag ``[SPEAKER0]``."""

    name: str
    voice: Voice


#: What the voice of a clip that a request brings along is called.
CLONED_VOICE = "custom"

#: What speaks where a scene describes the voice: the model chooses one that fits.
SCENE_VOICE = Voice(voice_id="scene", name="Scene")


def is_voice_described(system_prompt: str | None) -> bool:
    """Whether a whole system text holds a scene, so that a request without a voice needs no clip."""
    return "<|scene_desc_start|>" in (system_prompt or "")


@dataclass(frozen=True, eq=False)
class SpokenTurn:
    """A text and the audio that speaks it: a reference, or an earlier part of a long text."""

    text: str
    clip: PromptClip


@dataclass(frozen=True, kw_only=True, eq=False)
class SpeechPrompt:
    """One utterance to make: a text in a voice, or a finished prompt.

    Args:
        text: what is spoken.
        voice: id or alias of a voice, or the voice itself; None is the default voice, or the one
            that the scene of ``system_prompt`` describes, if it has one.
        voices: for a text of several speakers, speaker -> voice, as ``{"SPEAKER0": "en_man"}``.
            The text begins with one of their tags (``[SPEAKER0]``) and has no others; ``voice``
            is not read then.
        language: ISO 639-1 code for sentence splitting; None takes the voice's.
        instructions: how it is spoken; joins the voice's scene text.
        system_prompt: replaces the whole system text, also the voice's.
        ref_audio: clip to clone for this request only: bytes of an audio file, or float32
            [num_samples], mono, at the codec's rate.
        ref_text: transcript of ``ref_audio``; required with it.
        history: turns spoken before, oldest first; they follow the voice's own clip, or take its
            place in a voice that has none.
        normalize: rewrite punctuation, units and sound tags before speaking.
        prompt_token_ids: a finished prompt instead of ``text``; it ends with the id that opens
            audio output, and each clip has one placeholder id per delayed frame (T + K + 1).
        prompt_codes: int [num_codebooks, T] for each clip of ``prompt_token_ids``, in order,
            without delay.

    Raises:
        InvalidRequestError: fields are missing or exclude each other.
    """

    text: str | None = None
    voice: str | Voice | None = None
    voices: Mapping[str, str | Voice] = field(default_factory=dict)
    language: str | None = None
    instructions: str | None = None
    system_prompt: str | None = None
    ref_audio: bytes | NDArray[np.float32] | None = None
    ref_text: str | None = None
    history: Sequence[SpokenTurn] = ()
    normalize: bool = True
    prompt_token_ids: Sequence[int] | None = None
    prompt_codes: Sequence[NDArray[np.integer]] = ()

    def __post_init__(self) -> None:
        if self.prompt_token_ids is None:
            self._check_text()
            return
        if self.text is not None:
            raise InvalidRequestError(
                "give either text or prompt_token_ids, not both", param="prompt_token_ids"
            )

    def _check_text(self) -> None:
        if self.text is None or not self.text.strip():
            raise InvalidRequestError("input is empty; give the text to speak", param="input")
        has_words = self.ref_text is not None and bool(self.ref_text.strip())
        if (self.ref_audio is not None) != has_words:
            missing = "ref_audio" if has_words else "ref_text"
            raise InvalidRequestError(
                f"{missing} is missing; ref_audio and its transcript ref_text go together",
                param=missing,
            )
        if self.voices:
            self._check_speakers(self.text)

    def _check_speakers(self, text: str) -> None:
        for name in self.voices:
            if _SPEAKER.fullmatch(name) is None:
                raise InvalidRequestError(
                    f"voices names {name[:80]!r}; its keys are SPEAKER0, SPEAKER1 and so on",
                    param="voices",
                )
        if self.ref_audio is not None:
            raise InvalidRequestError(
                "ref_audio is one voice and excludes voices; upload the clip as a voice and name "
                "it in voices",
                param="voices",
            )
        first, *_ = self.voices
        named = speaker_tags(text)
        if not named or not text.lstrip().startswith(f"[{named[0]}]"):
            raise InvalidRequestError(
                f"input must begin with the tag of a speaker of voices, as [{first}]", param="input"
            )
        strangers = [name for name in named if name not in self.voices]
        if strangers:
            raise InvalidRequestError(
                f"input names {strangers[0]}, who has no voice; voices has "
                f"{', '.join(self.voices)}",
                param="voices",
            )

    @property
    def named_speakers(self) -> list[str]:
        """The speakers of ``voices`` that the text names, sorted."""
        return sorted(set(speaker_tags(self.text or "")) & self.voices.keys())

    @property
    def is_raw(self) -> bool:
        """True when the caller built the prompt; guards that rest on the text are off then."""
        return self.prompt_token_ids is not None


def voice_id_of(prompt: SpeechPrompt) -> str:
    """Id of the voice that is heard; ids of several with commas between them."""
    if prompt.ref_audio is not None:
        return CLONED_VOICE
    heard = [prompt.voices[name] for name in prompt.named_speakers]
    if not heard and prompt.voice is not None:
        heard = [prompt.voice]
    return ",".join(voice.voice_id for voice in heard if isinstance(voice, Voice))


@dataclass(frozen=True, eq=False)
class BuiltPrompt:
    """A prompt as the engine takes it.

    ``token_ids`` is int32 [num_positions]; each clip in ``clips`` fills one run of placeholder
    ids of its delayed length, which begins at the position of the same index in ``clip_starts``.
    The first ``num_voice_positions`` show the voice; what follows belongs to the text.
    """

    token_ids: NDArray[np.int32]
    clips: tuple[PromptClip, ...] = ()
    clip_starts: tuple[int, ...] = ()
    num_voice_positions: int = 0

    def __post_init__(self) -> None:
        assert len(self.clips) == len(self.clip_starts), "each clip needs its start"

    @property
    def num_positions(self) -> int:
        return int(self.token_ids.shape[0])


class PromptBuilder(Protocol):
    """Turns text and voice into positions, for one model family."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of plain text."""
        ...

    @property
    def start_ids(self) -> Sequence[int]:
        """Ids that open every prompt."""
        ...

    def build(
        self,
        text: str,
        voice: Voice,
        *,
        instructions: str | None = None,
        system_prompt: str | None = None,
        normalize: bool = True,
        history: Sequence[SpokenTurn] = (),
        speakers: Sequence[Speaker] = (),
    ) -> BuiltPrompt:
        """Prompt that speaks ``text``; ``history`` are earlier parts, oldest first.

        ``speakers`` are those whose tags the text may have; they take the place of ``voice``.
        """
        ...

    def from_token_ids(
        self, token_ids: Sequence[int], codes: Sequence[NDArray[np.integer]]
    ) -> BuiltPrompt:
        """Check a finished prompt.

        Raises:
            InvalidRequestError: an id is out of range, or runs and codes do not fit.
        """
        ...

    def is_speakable(self, text: str, *, normalize: bool = True) -> bool:
        """Whether anything of ``text`` is left to speak."""
        ...

    def count_tokens(self, text: str) -> int:
        """Number of text ids of ``text``."""
        ...


class VoiceSource(Protocol):
    """Where voices come from."""

    def resolve(self, voice: str | None) -> Voice:
        """Voice of that id or alias; None is the default voice.

        Raises:
            UnknownVoiceError: there is none of that name; the message lists those there are.
        """
        ...


def resolve_voices(source: VoiceSource, voices: Mapping[str, str | Voice]) -> dict[str, Voice]:
    """The voices of speakers, looked up where they are names.

    Raises:
        InvalidRequestError: a voice is unknown or cannot be used; the message names the speaker.
    """
    return {speaker: _resolve(source, speaker, voice) for speaker, voice in voices.items()}


def _resolve(source: VoiceSource, speaker: str, voice: str | Voice) -> Voice:
    if isinstance(voice, Voice):
        return voice
    try:
        return source.resolve(voice)
    except InvalidRequestError as error:
        raise type(error)(f"voices.{speaker}: {error}", param="voices") from error
