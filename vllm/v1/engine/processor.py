"""A caller's prompt and parameters into a ``SpeechTask``: voice, split, prompt, limits, seed.

Everything that can be wrong with a request is found here, before the engine hears of it. No
torch, and no waiting.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm.config import EngineConfig
from vllm.exceptions import InvalidRequestError
from vllm.player import VirtualPlayer
from vllm.prompts import (
    CLONED_VOICE,
    SCENE_VOICE,
    BuiltPrompt,
    PromptClip,
    Speaker,
    SpeechPrompt,
    SpokenTurn,
    TextTokenizer,
    Voice,
    VoiceSource,
    is_voice_described,
    resolve_voices,
)
from vllm.prompts.registry import load_prompt_builder
from vllm.prompts.splitting import (
    repeat_speakers,
    speech_limit_seconds,
    split_text,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.messages import EngineInfo
from vllm.v1.engine.speech_task import Guards, Part, SpeechTask, frames_of

__all__ = ["Processor"]

# Of seeds drawn here: replies tell them in JSON, and JavaScript reads its numbers as doubles.
_SEED_BITS = 53


class Processor:
    """Checks requests and makes tasks of them.

    Args:
        config: of the engine.
        info: of the loaded engine.
        voices: where voice names are looked up.
    """

    def __init__(self, config: EngineConfig, info: EngineInfo, voices: VoiceSource) -> None:
        self._config = config
        self._info = info
        self._voices = voices
        self._builder = load_prompt_builder(
            info.architecture,
            model_folder=Path(info.model_folder),
            tokenizer_folder=Path(info.tokenizer_folder),
        )

    def process(
        self,
        request_id: str,
        prompt: SpeechPrompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        player: VirtualPlayer | None = None,
    ) -> SpeechTask:
        """Make the task of one request; the arguments are those of ``AsyncLLM.generate``.

        Raises:
            InvalidRequestError: a field is wrong; ``param`` names it.
        """
        arrival_time = time.monotonic()
        if prompt.is_raw:
            parts, keeps_voice, pins_voice = [self._raw_part(prompt)], False, False
        else:
            speakers = self._speakers(prompt)
            voice = speakers[0].voice if speakers else self._voice(prompt)
            self._check_history(prompt.history)
            parts = self._text_parts(prompt, voice, speakers)
            is_kept = all(
                each.clip is not None or each.is_trained for each in _voices_of(voice, speakers)
            )
            keeps_voice = not is_kept and not prompt.history
            # NOTE: what the request itself puts before the voice hardly comes again.
            is_changed = speakers or prompt.instructions or prompt.system_prompt
            pins_voice = voice.is_pinned and not is_changed
        is_guarded = not prompt.is_raw and params.eos_rule == "strict"
        if not is_guarded:
            parts = [dataclasses.replace(part, max_frames=None) for part in parts]
        return SpeechTask(
            request_id,
            parts,
            params,
            seed=_seed(params),
            guards=self._guards(params) if is_guarded else Guards(),
            keeps_voice=keeps_voice and len(parts) > 1,
            pins_voice=pins_voice,
            info=self._info,
            arrival_time=arrival_time,
            priority=priority,
            player=player,
        )

    def prompts_of(self, prompt: SpeechPrompt) -> list[BuiltPrompt]:
        """The prompts that speak a text: one for each of its parts, in order.

        Later parts in a voice without a clip are spoken with the first part before them, which is
        not known here.

        Raises:
            InvalidRequestError: a field is wrong.
        """
        speakers = self._speakers(prompt)
        voice = speakers[0].voice if speakers else self._voice(prompt)
        self._check_history(prompt.history)
        return [part.build(()) for part in self._text_parts(prompt, voice, speakers)]

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of plain text."""
        return self._builder.tokenizer

    @property
    def start_ids(self) -> Sequence[int]:
        """Ids that open every prompt."""
        return self._builder.start_ids

    @property
    def max_model_len(self) -> int:
        """Positions of one request, audio included."""
        return self._info.max_model_len

    def _voice(self, prompt: SpeechPrompt) -> Voice:
        if prompt.ref_audio is None:
            given = prompt.voice
            if given is None and is_voice_described(prompt.system_prompt):
                return SCENE_VOICE
            return given if isinstance(given, Voice) else self._voices.resolve(given)
        self._check_can_encode("ref_audio")
        samples = self._clip_samples(prompt.ref_audio)
        num_frames = samples.size // self._info.hop_length
        return Voice(
            voice_id=CLONED_VOICE,
            name=CLONED_VOICE,
            language=prompt.language or "en",
            transcript=prompt.ref_text,
            clip=PromptClip(num_frames, samples=samples),
            # How much a model speaks in one part is known of its default voice only.
            max_chars=self._voices.resolve(None).max_chars,
        )

    def _speakers(self, prompt: SpeechPrompt) -> list[Speaker]:
        voices = resolve_voices(self._voices, prompt.voices)
        return [Speaker(name, voices[name]) for name in prompt.named_speakers]

    def _check_can_encode(self, field: str) -> None:
        if not self._info.can_encode:
            raise InvalidRequestError(
                f"{field} cannot be used: this server's codec holds no encoder (decode_only); "
                "choose one of the listed voices",
                param=field,
            )

    def _check_history(self, history: Sequence[SpokenTurn]) -> None:
        for index, turn in enumerate(history):
            clip, info = turn.clip, self._info
            found: tuple[int, ...]
            wanted: tuple[int, ...]
            if clip.codes is not None:
                found, wanted = clip.codes.shape, (info.num_codebooks, clip.num_frames)
            else:
                assert clip.samples is not None
                self._check_can_encode("history")
                found, wanted = clip.samples.shape, (clip.num_frames * info.hop_length,)
            if found != wanted or clip.num_frames < 1:
                raise InvalidRequestError(
                    f"history[{index}] has a clip of shape {found}; {clip.num_frames} frames need "
                    f"{wanted}, and there must be one or more",
                    param="history",
                )

    def _clip_samples(self, clip: bytes | NDArray[np.float32]) -> NDArray[np.float32]:
        """Samples at the codec's rate, zeros added up to a whole frame."""
        hop = self._info.hop_length
        if isinstance(clip, bytes):
            from vllm.audio.reference import decode_clip

            return decode_clip(clip, sample_rate=self._info.sample_rate, pad_to=hop)
        samples = np.asarray(clip)
        is_real = np.issubdtype(samples.dtype, np.floating)
        if not is_real or samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
            raise InvalidRequestError(
                f"ref_audio of type {samples.dtype} and shape {samples.shape} is not allowed; give "
                f"finite mono samples [num_samples] in [-1, 1] at {self._info.sample_rate} Hz as "
                "floats, or the bytes of an audio file",
                param="ref_audio",
            )
        return np.pad(samples.astype(np.float32), (0, -samples.size % hop))

    def _text_parts(
        self, prompt: SpeechPrompt, voice: Voice, speakers: Sequence[Speaker]
    ) -> list[Part]:
        has_guard = self._config.audio.text_length_guard
        return [
            Part(
                text,
                self._build_call(prompt, voice, speakers, text),
                frames_of(speech_limit_seconds(text), self._info) if has_guard else None,
                partial(self._longest_field, prompt, _voices_of(voice, speakers), text),
            )
            for text in self._split(prompt, voice, speakers)
        ]

    def _longest_field(self, prompt: SpeechPrompt, voices: Sequence[Voice], text: str) -> str:
        """Which field of a request takes up most of the prompt that speaks ``text``."""
        count = self._builder.count_tokens
        is_described = prompt.system_prompt is None  # instructions are unused beside it
        turns = [SpokenTurn(each.transcript or "", each.clip) for each in voices if each.clip]
        scenes = [each.system_prompt or each.scene or "" for each in voices if is_described]
        lengths = {
            "input": count(text),
            "instructions": count(prompt.instructions or "") if is_described else 0,
            "system_prompt": count(prompt.system_prompt or ""),
            "voice" if prompt.ref_audio is None else "ref_audio": (
                sum(map(count, scenes)) + self._num_positions(turns)
            ),
            "history": self._num_positions(prompt.history),
        }
        return max(lengths, key=lengths.__getitem__)

    def _num_positions(self, turns: Sequence[SpokenTurn]) -> int:
        return sum(self._builder.count_tokens(turn.text) + turn.clip.num_frames for turn in turns)

    def _split(self, prompt: SpeechPrompt, voice: Voice, speakers: Sequence[Speaker]) -> list[str]:
        """Pieces of the text that hold something to speak; of one that holds nothing, itself."""
        assert prompt.text is not None
        pieces = split_text(
            prompt.text,
            language=prompt.language or voice.language,
            max_chars=min(each.max_chars for each in _voices_of(voice, speakers)),
        )
        normalize = prompt.normalize
        spoken = [
            piece for piece in pieces if self._builder.is_speakable(piece, normalize=normalize)
        ]
        if prompt.voices:
            spoken = list(repeat_speakers(spoken))
        return spoken or [prompt.text]

    def _build_call(
        self, prompt: SpeechPrompt, voice: Voice, speakers: Sequence[Speaker], text: str
    ) -> Callable[[Sequence[SpokenTurn]], BuiltPrompt]:
        def build(history: Sequence[SpokenTurn]) -> BuiltPrompt:
            return self._builder.build(
                text,
                voice,
                instructions=prompt.instructions,
                system_prompt=prompt.system_prompt,
                normalize=prompt.normalize,
                history=(*prompt.history, *history),
                speakers=speakers,
            )

        return build

    def _raw_part(self, prompt: SpeechPrompt) -> Part:
        assert prompt.prompt_token_ids is not None
        built = self._builder.from_token_ids(prompt.prompt_token_ids, prompt.prompt_codes)
        return Part("", lambda _history: built, longest_field=lambda: "prompt_token_ids")

    def _guards(self, params: SamplingParams) -> Guards:
        audio = self._config.audio
        max_audio_s = _tighter(params.max_audio_s, audio.max_audio_seconds)
        max_silence_s = (
            audio.max_silence_seconds if params.max_silence_s is None else params.max_silence_s
        )
        return Guards(
            max_audio_frames=frames_of(max_audio_s, self._info),
            max_silence_frames=frames_of(max_silence_s, self._info),
        )


def _voices_of(voice: Voice, speakers: Sequence[Speaker]) -> list[Voice]:
    return [speaker.voice for speaker in speakers] or [voice]


def _tighter(asked: float | None, server: float) -> float:
    """The smaller of two limits, where 0 and None are none."""
    return min(filter(None, (asked, server)), default=0.0)


def _seed(params: SamplingParams) -> int:
    """The seed in use: as given, 0 where nothing is drawn, else a random one."""
    if params.seed is not None:
        return params.seed
    return 0 if params.temperature == 0 else secrets.randbits(_SEED_BITS)
