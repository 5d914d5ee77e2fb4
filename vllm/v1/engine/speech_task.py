"""One utterance as its caller sees it: parts of a text spoken one after the other, as one audio.

Turns parts into engine requests and engine outputs into increments. Pure bookkeeping: it neither
sends nor waits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from vllm.exceptions import PromptTooLongError
from vllm.outputs import FinishReason, SpeechOutput, SpeechStats, Usage
from vllm.player import Listener, VirtualPlayer
from vllm.prompts import BuiltPrompt, PromptClip, SpokenTurn
from vllm.sampling_params import SamplingParams
from vllm.seeds import derive_seed
from vllm.v1.engine.messages import ClipData, EngineCoreOutput, EngineCoreRequest, EngineInfo

__all__ = ["Guards", "Part", "SpeechTask", "frames_of"]

# A part that ends so has said what it could; the text goes on with the next one.
_GOES_ON = frozenset({FinishReason.STOP, FinishReason.SILENCE, FinishReason.TEXT_LENGTH})
# A task that ends so has been broken off: whoever listened still waits for audio.
_BREAKS_OFF = frozenset({FinishReason.ABORT, FinishReason.DEADLINE, FinishReason.ERROR})

_task_numbers = count()  # of all tasks of this process


@dataclass(frozen=True)
class Guards:
    """Limits that do not come from ``max_tokens``; None is no limit."""

    max_audio_frames: int | None = None  # over all parts
    max_silence_frames: int | None = None


@dataclass(frozen=True)
class Part:
    """A piece of the text.

    ``build`` makes its prompt from the turns that were spoken before; ``max_frames`` is the most
    audio that its text can need, None for no limit; ``longest_field`` tells which field of the
    request takes up most of the prompt, when that is too long.
    """

    text: str
    build: Callable[[Sequence[SpokenTurn]], BuiltPrompt]
    max_frames: int | None = None
    longest_field: Callable[[], str] = lambda: "input"


class SpeechTask:
    """A request of the API side until its last sample.

    ``next_request`` gives the engine request of the next part, ``absorb`` takes what the engine
    says of it. At most one part is in the engine at a time, so that limits hold over all parts.

    Args:
        request_id: as the caller knows it.
        parts: at least one.
        params: sampling of every part; ``params.seed`` is not read.
        seed: the one in use; part i gets one derived from it.
        guards: further limits.
        keeps_voice: later parts get the first one as context, for voices that have no clip.
        pins_voice: keep what shows the voice in the cache, for requests to come.
        info: of the engine.
        arrival_time: ``time.monotonic()`` at which the request came.
        priority: smaller is sooner.
        player: of whoever listens while the audio is made; it is fed here. None if nobody does.
    """

    def __init__(
        self,
        request_id: str,
        parts: Sequence[Part],
        params: SamplingParams,
        *,
        seed: int,
        guards: Guards,
        keeps_voice: bool,
        pins_voice: bool = False,
        info: EngineInfo,
        arrival_time: float,
        priority: int = 0,
        player: VirtualPlayer | None = None,
    ) -> None:
        self.request_id = request_id
        self.seed = seed
        self.finish_reason: FinishReason | None = None
        self._parts = parts
        self._params = params
        self._guards = guards
        self._keeps_voice = keeps_voice
        self._pins_voice = pins_voice
        self._info = info
        self._arrival_time = arrival_time
        self._priority = priority
        self._player = player
        self._number = next(_task_numbers)
        self._index = 0
        self._usage = Usage()
        self._queue_time_s = 0.0
        self._prefill_time_s = 0.0
        self._decode_time_s = 0.0
        self._num_preemptions = 0
        self._first_audio_s: float | None = None
        self._worst_reason = FinishReason.STOP
        self._break_off_reason: FinishReason | None = None
        self._first_codes: list[NDArray[np.int16]] = []
        self._prompt: BuiltPrompt | None = None
        self._part_frames = 0  # real frames of the current part
        self._part_delayed = 0  # delayed frames of the current part

    @property
    def core_id(self) -> str:
        """Id of the current part in the engine, which no other part has ever had.

        So a name may be used again while the engine still speaks of the request that had it, and no
        name can be that of another request's part.
        """
        return f"{self.request_id}#{self._number}.{self._index}"

    def next_request(self) -> EngineCoreRequest:
        """Engine request of the current part.

        Raises:
            PromptTooLongError: its prompt leaves no room for audio.
        """
        part = self._parts[self._index]
        prompt = self._prompt = part.build(self._history())
        self._part_frames = self._part_delayed = 0
        limit, reason = self._frame_limit(part, prompt)
        return EngineCoreRequest(
            request_id=self.core_id,
            prompt_token_ids=prompt.token_ids.astype(np.int32).tobytes(),
            sampling_params=self._params,
            seed=derive_seed(self.seed, self._index),
            frame_limit=limit,
            limit_reason=reason,
            clips=tuple(
                _clip_data(clip, start)
                for clip, start in zip(prompt.clips, prompt.clip_starts, strict=True)
            ),
            max_silence_frames=self._guards.max_silence_frames,
            num_pinned_positions=prompt.num_voice_positions if self._pins_voice else 0,
            arrival_time=self._arrival_time if self._index == 0 else time.monotonic(),
            priority=self._priority,
            listener=self._listener(),
        )

    def break_off(self, reason: FinishReason) -> None:
        """Have no part follow the current one; ``reason`` ends the task then.

        The engine is to be told to end the current part. That message may cross with the part's
        own end, which is why the task must know too.
        """
        self._break_off_reason = reason

    def absorb(self, output: EngineCoreOutput) -> SpeechOutput:
        """Take an output of the current part; returns the increment for the caller.

        ``finish_reason`` of the increment is set when the whole task has ended. When the part has
        ended and the task has not, ``next_request`` must be called for the next part.
        """
        num_codebooks = self._info.num_codebooks
        audio = np.frombuffer(output.audio, np.float32)
        codes = np.frombuffer(output.codes, np.int16).reshape(num_codebooks, -1)
        delayed = np.frombuffer(output.delayed_codes, np.int16).reshape(-1, num_codebooks)
        now = time.monotonic()
        if audio.size and self._first_audio_s is None:
            self._first_audio_s = now - self._arrival_time
        self._part_frames += codes.shape[1]
        self._part_delayed += delayed.shape[0]
        if self._keeps_voice and self._index == 0:
            self._first_codes.append(codes)
        if output.finish_reason is not None:
            self._end_part(output, output.finish_reason)
        if self._player is not None:
            self._play(self._player, now, audio.size)
        return SpeechOutput(
            request_id=self.request_id,
            audio=audio,
            codes=codes,
            delayed_codes=delayed,
            sample_rate=self._info.sample_rate,
            finish_reason=self.finish_reason,
            usage=self._usage,
            stats=self._stats(),
            seed=self.seed,
            error=output.error,
        )

    def _play(self, player: VirtualPlayer, now: float, num_samples: int) -> None:
        # NOTE: here and not where bytes leave, so that a slow reader is no slow server.
        player.feed(now, num_samples / self._info.sample_rate)
        if self.finish_reason in _BREAKS_OFF:
            player.leave(now)
        elif self.finish_reason is not None:
            player.end()

    def _end_part(self, output: EngineCoreOutput, reason: FinishReason) -> None:
        stats = output.stats
        assert self._prompt is not None
        self._usage += Usage(
            prompt_tokens=self._prompt.num_positions,
            completion_tokens=self._part_delayed,
            audio_tokens=self._part_frames,
            cached_tokens=stats.num_cached_positions if stats else 0,
            prompt_audio_tokens=sum(clip.num_frames for clip in self._prompt.clips),
        )
        if stats is not None:
            self._num_preemptions += stats.num_preemptions
            self._queue_time_s += stats.queue_time_s
            self._prefill_time_s += stats.prefill_time_s
            self._decode_time_s += stats.decode_time_s
        self._index += 1
        if reason is not FinishReason.STOP:
            self._worst_reason = reason
        if reason not in _GOES_ON:
            self.finish_reason = reason
        elif self._index == len(self._parts):
            self.finish_reason = self._worst_reason
        else:
            self.finish_reason = self._break_off_reason or self._spent()

    def _spent(self) -> FinishReason | None:
        """Which limit over all parts is used up before the next one, if any."""
        if self._tokens_left() is not None and self._tokens_left() == 0:
            return FinishReason.LENGTH
        if self._audio_frames_left() == 0:
            return FinishReason.MAX_AUDIO
        return None

    def _tokens_left(self) -> int | None:
        if self._params.max_tokens is None:
            return None
        return max(0, self._params.max_tokens - self._usage.completion_tokens)

    def _audio_frames_left(self) -> int | None:
        if self._guards.max_audio_frames is None:
            return None
        return max(0, self._guards.max_audio_frames - self._usage.audio_tokens)

    def _listener(self) -> Listener | None:
        """Who waits for the current part: since the arrival, as long as there was no audio."""
        if self._player is None:
            return None
        dry_at = self._player.dry_at
        return Listener(self._player.speed, self._arrival_time if dry_at is None else dry_at)

    def _frame_limit(self, part: Part, prompt: BuiltPrompt) -> tuple[int, FinishReason]:
        """Delayed frames that the part may have, and which limit that is."""
        num_codebooks = self._info.num_codebooks
        room = self._info.max_model_len - prompt.num_positions
        if room <= num_codebooks:
            field = part.longest_field()
            raise PromptTooLongError(
                f"{field} is too long: the prompt has {prompt.num_positions} positions and the "
                f"context {self._info.max_model_len}; audio needs at least {num_codebooks + 1} more",
                param=field,
            )
        limits = [(room, FinishReason.LENGTH)]
        tokens_left, frames_left = self._tokens_left(), self._audio_frames_left()
        if tokens_left is not None:
            limits.append((tokens_left, FinishReason.LENGTH))
        # T real frames that no EOS ends are T + K delayed ones.
        if frames_left is not None:
            limits.append((frames_left + num_codebooks, FinishReason.MAX_AUDIO))
        if part.max_frames is not None:
            limits.append((part.max_frames + num_codebooks, FinishReason.TEXT_LENGTH))
        return min(limits, key=lambda limit: limit[0])

    def _history(self) -> list[SpokenTurn]:
        if self._index == 0 or not self._keeps_voice:
            return []
        codes = np.concatenate(self._first_codes, axis=1)
        if codes.shape[1] == 0:
            return []
        return [SpokenTurn(self._parts[0].text, PromptClip(codes.shape[1], codes=codes))]

    def _stats(self) -> SpeechStats:
        num_frames = self._usage.audio_tokens
        return SpeechStats(
            audio_duration_s=num_frames / self._info.frame_rate,
            processing_time_s=time.monotonic() - self._arrival_time,
            queue_time_s=self._queue_time_s,
            prefill_time_s=self._prefill_time_s,
            decode_time_s=self._decode_time_s,
            time_to_first_audio_s=self._first_audio_s,
            num_preemptions=self._num_preemptions,
            num_parts=len(self._parts),
        )


def frames_of(seconds: float, info: EngineInfo) -> int | None:
    """Whole frames in ``seconds``, rounded up; None for 0, which is no limit."""
    return math.ceil(seconds * info.frame_rate) if seconds else None


def _clip_data(clip: PromptClip, start: int) -> ClipData:
    if clip.codes is not None:
        codes = np.ascontiguousarray(clip.codes, np.int16)
        return ClipData(start, clip.num_frames, codes=codes.tobytes())
    assert clip.samples is not None
    samples = np.ascontiguousarray(clip.samples, np.float32)
    return ClipData(start, clip.num_frames, samples=samples.tobytes())
