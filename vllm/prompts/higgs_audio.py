"""Prompts of Higgs Audio v2: system turn, reference, earlier turns, text turn.

Ids come from the tokenizer and the checkpoint's config by name. How clips become codes and how
positions become embeddings is the engine's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm.checkpoint_config import HiggsAudioConfig
from vllm.exceptions import ConfigError, InvalidRequestError
from vllm.prompts.interface import BuiltPrompt, PromptClip, Speaker, SpokenTurn, Voice
from vllm.prompts.normalize import SOUND_MARKS, normalize_text
from vllm.prompts.tokenizer import TextTokenizer

__all__ = ["DEFAULT_SCENE", "HiggsAudioPromptBuilder"]

DEFAULT_SCENE = "Audio is recorded from a quiet room."
_INSTRUCTION = "Generate audio following instruction."
_SYSTEM_MARKS = (
    "<|scene_desc_start|>",
    "<|scene_desc_end|>",
    "<|generation_instruction_start|>",
    "<|generation_instruction_end|>",
)

Role = Literal["system", "user", "assistant"]


class _Turn(NamedTuple):
    role: Role
    ids: list[int]
    clips: tuple[PromptClip, ...] = ()  # that fill the slots among them, in order


class HiggsAudioPromptBuilder:
    """Builds in-context cloning prompts for one checkpoint.

    Raises:
        ConfigError: tokenizer and config disagree about the id that opens audio.
        CheckpointError: the tokenizer lacks a token that every prompt needs.
    """

    def __init__(self, tokenizer: TextTokenizer, config: HiggsAudioConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._bos = tokenizer.token_id("<|begin_of_text|>")
        self._start_header = tokenizer.token_id("<|start_header_id|>")
        self._end_header = tokenizer.token_id("<|end_header_id|>")
        self._end_of_turn = tokenizer.token_id("<|eot_id|>")
        self._open_audio = tokenizer.token_id("<|audio_out_bos|>")
        self._close_audio = tokenizer.token_id("<|audio_eos|>")
        if self._open_audio != config.audio_out_bos_token_id:
            raise ConfigError(
                f"the tokenizer spells id {self._open_audio} <|audio_out_bos|>, but config.json "
                f"opens audio with {config.audio_out_bos_token_id}; both must be of one checkpoint"
            )

    @classmethod
    def from_folder(cls, model_folder: Path, tokenizer_folder: Path) -> HiggsAudioPromptBuilder:
        """Builder of a checkpoint; both folders are usually the same."""
        return cls(
            TextTokenizer.from_folder(tokenizer_folder), HiggsAudioConfig.from_folder(model_folder)
        )

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._tokenizer

    @property
    def start_ids(self) -> Sequence[int]:
        return (self._bos,)

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
        """Prompt that speaks ``text`` in ``voice``, or its turns in the voices of ``speakers``.

        Args:
            text: as the user wrote it.
            voice: its clip is the reference; without one its scene text alone describes it.
            instructions: joins the voice's scene text; unused beside a system prompt.
            system_prompt: replaces the whole system text, also the voice's.
            normalize: rewrite ``text`` and the texts of ``history`` first.
            history: earlier parts as the user wrote them, oldest first.
            speakers: where all have clips, each clip is a turn of its speaker; else the system
                turn lists them, with a clip or a description.

        Raises:
            InvalidRequestError: nothing is left to speak, or a speaker's voice cannot be shown
                beside others.
        """
        opening = self._voice_turns(voice, speakers, instructions, system_prompt)
        turns = []
        for part in history:
            earlier = _Turn("user", self._encode_text(part.text, normalize))
            turns += [earlier, self._spoken(part.clip)]
        text_ids = self._encode_text(text, normalize)
        if not text_ids:
            raise InvalidRequestError("input holds nothing to speak", param="input")
        turns.append(_Turn("user", text_ids))
        voice_ids = [self._bos, *self._render(opening)]
        ids = [*voice_ids, *self._render(turns), *self._header("assistant"), self._open_audio]
        return self._built(
            np.asarray(ids, np.int32),
            tuple(clip for turn in (*opening, *turns) for clip in turn.clips),
            # A user's turn follows whatever is said, so its header is the voice's as well.
            num_voice_positions=len(voice_ids) + len(self._header("user")),
        )

    def from_token_ids(
        self, token_ids: Sequence[int], codes: Sequence[NDArray[np.integer]]
    ) -> BuiltPrompt:
        """Check a finished prompt; placeholders of either layout become the one of ``build``.

        Args:
            token_ids: [num_positions], ending with the id that opens audio output.
            codes: int [num_codebooks, T] for each placeholder run, in order, without delay.

        Raises:
            InvalidRequestError: an id is out of range, or runs and codes do not fit.
        """
        ids = self._check_ids(token_ids)
        clips = tuple(self._check_codes(each, index) for index, each in enumerate(codes))
        is_slot = np.isin(ids, list(self._config.audio_placeholder_ids))
        run_lengths = [sum(1 for _ in run) for slot, run in groupby(is_slot) if slot]
        if len(run_lengths) != len(clips):
            raise InvalidRequestError(
                f"prompt_token_ids has {len(run_lengths)} audio placeholder runs, but prompt_codes "
                f"has {len(clips)} clips; give one clip for each run",
                param="prompt_codes",
            )
        for index, (length, clip) in enumerate(zip(run_lengths, clips, strict=True)):
            if length != self._num_slots(clip):
                raise InvalidRequestError(
                    f"placeholder run {index} of prompt_token_ids has {length} ids, but "
                    f"prompt_codes[{index}] with {clip.num_frames} frames needs "
                    f"{self._num_slots(clip)} (frames + codebooks + 1)",
                    param="prompt_token_ids",
                )
        ids[is_slot] = self._config.audio_token_id
        return self._built(ids, clips)

    def is_speakable(self, text: str, *, normalize: bool = True) -> bool:
        """Whether anything of ``text`` is left to speak."""
        return bool(self._encode_text(text, normalize))

    def count_tokens(self, text: str) -> int:
        """Number of text ids of ``text``."""
        return len(self._tokenizer.encode(text))

    def _voice_turns(
        self,
        voice: Voice,
        speakers: Sequence[Speaker],
        instructions: str | None,
        system_prompt: str | None,
    ) -> list[_Turn]:
        """Turns that tell who speaks and how, whatever is said."""
        if speakers and any(speaker.voice.clip is None for speaker in speakers):
            if system_prompt is not None:
                raise InvalidRequestError(
                    "system_prompt is not possible with voices that have no clip: it replaces "
                    "their descriptions",
                    param="system_prompt",
                )
            return [self._cast(speakers, instructions)]
        own_text = None if speakers else voice.system_prompt
        scene = None if speakers else voice.scene
        system_text = system_prompt or own_text or _system_text(scene, instructions)
        turns = [_Turn("system", self._encode_marked(system_text.strip(), _SYSTEM_MARKS))]
        for transcript, clip in _references(voice, speakers):
            turns += [_Turn("user", self._tokenizer.encode(transcript)), self._spoken(clip)]
        return turns

    def _built(
        self, ids: NDArray[np.int32], clips: tuple[PromptClip, ...], num_voice_positions: int = 0
    ) -> BuiltPrompt:
        is_slot = ids == self._config.audio_token_id
        begins = is_slot & ~np.roll(is_slot, 1)  # no prompt ends with a slot
        starts = tuple(np.flatnonzero(begins).tolist())
        return BuiltPrompt(ids, clips, starts, num_voice_positions)

    def _render(self, turns: Sequence[_Turn]) -> Iterator[int]:
        """Ids of the turns; two assistant turns, which eom would part, never meet in them."""
        for turn in turns:
            yield from self._header(turn.role)
            yield from turn.ids
            yield self._end_of_turn

    def _header(self, role: Role) -> list[int]:
        encode = self._tokenizer.encode
        return [self._start_header, *encode(role), self._end_header, *encode("\n\n")]

    def _spoken(self, clip: PromptClip) -> _Turn:
        slots = [self._config.audio_token_id] * self._num_slots(clip)
        return _Turn("assistant", [self._open_audio, *slots, self._close_audio], (clip,))

    def _num_slots(self, clip: PromptClip) -> int:
        """Delayed frames of a clip: its own, one BOS and one EOS column, K - 1 of delay."""
        return clip.num_frames + self._config.num_codebooks + 1

    def _cast(self, speakers: Sequence[Speaker], instructions: str | None) -> _Turn:
        """System turn with a line for each speaker: a clip or a description."""
        opening, closing = _system_text(None, instructions).rsplit("\n", 1)
        ids: list[int] = []
        text = opening + "\n"
        for name, voice in speakers:
            text += f"\n{name}: "
            if voice.clip is None:
                text += _description(name, voice)
                continue
            ids += [*self._encode_marked(text, _SYSTEM_MARKS), *self._spoken(voice.clip).ids]
            text = ""
        ids += self._encode_marked(f"{text}\n{closing}", _SYSTEM_MARKS)
        return _Turn("system", ids, tuple(each.clip for _, each in speakers if each.clip))

    def _encode_text(self, text: str, normalize: bool) -> list[int]:
        if normalize:
            return self._encode_marked(normalize_text(text), SOUND_MARKS)
        return self._tokenizer.encode(text.strip())

    def _encode_marked(self, text: str, marks: Sequence[str]) -> list[int]:
        """Ids of ``text`` in which the spellings ``marks`` stand for their tokens.

        A mark that the tokenizer lacks is ordinary text.
        """
        known = [mark for mark in marks if self._tokenizer.has_token(mark)]
        if not known:
            return self._tokenizer.encode(text)
        pieces = re.split("(" + "|".join(map(re.escape, known)) + ")", text)
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            is_mark = index % 2 == 1
            ids += [self._tokenizer.token_id(piece)] if is_mark else self._tokenizer.encode(piece)
        return ids

    def _check_ids(self, token_ids: Sequence[int]) -> NDArray[np.int32]:
        for index, token_id in enumerate(token_ids):
            is_int = isinstance(token_id, int | np.integer) and not isinstance(token_id, bool)
            if not is_int or not 0 <= token_id < self._config.vocab_size:
                raise InvalidRequestError(
                    f"prompt_token_ids[{index}]={token_id!r} must be a whole number from 0 to "
                    f"{self._config.vocab_size - 1}",
                    param="prompt_token_ids",
                )
        if not len(token_ids) or token_ids[-1] != self._open_audio:
            raise InvalidRequestError(
                f"prompt_token_ids must end with {self._open_audio} (<|audio_out_bos|>), "
                "which opens audio output",
                param="prompt_token_ids",
            )
        return np.asarray(token_ids, np.int32)

    def _check_codes(self, codes: NDArray[np.integer], index: int) -> PromptClip:
        codes = np.asarray(codes)
        field = f"prompt_codes[{index}]"
        num_codebooks = self._config.num_codebooks
        if codes.ndim != 2 or codes.shape[0] != num_codebooks or codes.shape[1] < 1:
            raise InvalidRequestError(
                f"{field} has shape {list(codes.shape)}; it must be [{num_codebooks}, T], T >= 1",
                param="prompt_codes",
            )
        if not np.issubdtype(codes.dtype, np.integer):
            raise InvalidRequestError(
                f"{field} has dtype {codes.dtype}; it must be whole numbers", param="prompt_codes"
            )
        max_code = min(self._config.stream_bos_id, self._config.stream_eos_id) - 1
        if codes.min() < 0 or codes.max() > max_code:
            raise InvalidRequestError(
                f"{field} has codes from {codes.min()} to {codes.max()}; "
                f"allowed are 0 to {max_code}",
                param="prompt_codes",
            )
        return PromptClip(num_frames=codes.shape[1], codes=codes.astype(np.int16))


def _references(voice: Voice, speakers: Sequence[Speaker]) -> Iterator[tuple[str, PromptClip]]:
    """Transcripts and clips of the voices that have one."""
    cast = [(f"[{name}] ", each) for name, each in speakers] or [("", voice)]
    for tag, each in cast:
        if each.clip is not None:
            yield tag + (each.transcript or "").strip(), each.clip


def _description(name: str, voice: Voice) -> str:
    """A voice without a clip in one line."""
    words = " ".join((voice.scene or voice.description).split())
    if not words:
        raise InvalidRequestError(
            f"voices.{name}: voice {voice.voice_id!r} has neither a clip nor a scene, so it cannot "
            "be one of several speakers",
            param="voices",
        )
    return words


def _system_text(scene: str | None, instructions: str | None) -> str:
    scene = scene or DEFAULT_SCENE
    body = "\n".join(text.strip() for text in (scene, instructions) if text and text.strip())
    return f"{_INSTRUCTION}\n\n<|scene_desc_start|>\n{body}\n<|scene_desc_end|>"
