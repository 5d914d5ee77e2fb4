"""The engine: requests in, steps, audio out. Runs in the engine process or in the caller's.

Owns the scheduler and the executor and lets them take turns; it knows no socket, no text and no
voice.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm import envs
from vllm.checkpoints.embedded import embedded_checkpoint, random_checkpoint
from vllm.config import DEFAULT_AUDIO_TOKENIZER, EngineConfig
from vllm.exceptions import CheckpointError, EngineError, HiggsAudioError, InvalidRequestError
from vllm.logger import get_logger
from vllm.model_executor.framing import DelayPattern
from vllm.model_executor.models import check_architecture
from vllm.model_executor.weights import resolve
from vllm.outputs import FinishReason
from vllm.sampling_params import SamplingParams
from vllm.v1.core.scheduler import Scheduler
from vllm.v1.engine.messages import (
    ClipData,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineInfo,
    EngineStats,
)
from vllm.v1.executor import Executor, UniProcExecutor
from vllm.v1.outputs import EncodedClip
from vllm.v1.request import Request

__all__ = ["EngineCore"]

logger = get_logger(__name__)

_IDLE_WAIT_S = 0.005  # for the codec, when the model has nothing to do
_MAX_CLIPS = 256  # whose codes are remembered
_WARM_UP_ID = "warm-up"
_WARM_UP_PROMPT = 40  # positions
_WARM_UP_FRAMES = 60  # enough for every size of audio chunk of the default ramp


class EngineCore:
    """One model, served to many requests.

    Requests are added and aborted between steps; ``step`` moves all of them on. It is ready, and
    warm, when the constructor returns.

    Raises:
        CheckpointError, ConfigError: what is to be loaded is wrong or does not fit.
    """

    def __init__(self, config: EngineConfig) -> None:
        folders = _resolve_folders(config)
        self._config = config
        self._executor: Executor = UniProcExecutor(
            config,
            model_folder=folders.model,
            codec_folder=folders.codec,
            clip_cache_folder=folders.clip_cache,
        )
        worker = self._executor.info
        self._pattern = DelayPattern(
            worker.num_codebooks, worker.stream_bos_id, worker.stream_eos_id
        )
        self._encoding: dict[str, _WaitingForClips] = {}  # req_id -> request
        self._queued_clips: set[str] = set()  # keys that the codec has been asked for
        self._clip_codes: OrderedDict[str, NDArray[np.int16]] = OrderedDict()  # key -> [K, T]
        self._num_clip_queries = 0
        self._num_clip_hits = 0  # without asking the codec
        self._refused: list[EngineCoreOutput] = []
        self._scheduler = self._make_scheduler()
        self.info = self._make_info(folders)
        self._warm_up()
        # Without traces of the warm-up:
        self._scheduler = self._make_scheduler()
        self._executor.reset_codec_stats()

    # The life of a request, as the clients see it

    def add_request(self, request: EngineCoreRequest) -> None:
        """Take a request; one that cannot run ends with an output that says why."""
        if not self._config.scheduler.player_deadlines:
            request = dataclasses.replace(request, listener=None)
        waiting = _WaitingForClips(request, self._pattern)
        for clip, key in waiting.missing():
            self._num_clip_queries += 1
            self._num_clip_hits += key in self._clip_codes or key in self._queued_clips
            if key in self._clip_codes:
                self._clip_codes.move_to_end(key)
                waiting.fill(key, self._clip_codes[key])
            elif key not in self._queued_clips:
                self._queued_clips.add(key)
                self._executor.encode_clip(key, np.frombuffer(clip, np.float32))
        if waiting.is_complete:
            self._admit(waiting)
        else:
            self._encoding[request.request_id] = waiting

    def abort_requests(
        self, request_ids: tuple[str, ...], reason: FinishReason = FinishReason.ABORT
    ) -> None:
        """End requests; unknown ids are ignored, each other gets its last output."""
        for request_id in request_ids:
            if self._encoding.pop(request_id, None) is not None:
                self._refused.append(EngineCoreOutput(request_id, finish_reason=reason))
        self._scheduler.finish_requests(request_ids, reason)

    def has_work(self) -> bool:
        """Whether ``step`` would move anything on."""
        return bool(
            self._refused
            or self._encoding
            or self._scheduler.has_unfinished()
            or self._executor.has_codec_work()
        )

    def step(self) -> EngineCoreOutputs:
        """One step of everything: schedule, execute, record."""
        plan = self._scheduler.schedule()
        result = self._executor.execute_model(plan, wait_s=_IDLE_WAIT_S)
        self._take_clips(result.clips)
        outputs = self._scheduler.update_from_output(plan, result)
        refused, self._refused = self._refused, []
        return EngineCoreOutputs((*refused, *outputs), self._stats())

    def check_integrity(self) -> None:
        """Assert that scheduler and worker agree about rows and blocks."""
        self._scheduler.check_integrity()
        self._executor.check_integrity()

    def shutdown(self) -> None:
        self._executor.shutdown()

    def _stats(self) -> EngineStats:
        """Queues now, and counts since the warm-up."""
        codec = self._executor.codec_stats()
        return EngineStats(
            scheduler=self._scheduler.stats(),
            codec=codec,
            num_clip_queries=self._num_clip_queries,
            num_clip_hits=self._num_clip_hits + codec.num_known_clips,
        )

    # Clips: samples become codes beside the steps, then the request is scheduled

    def _take_clips(self, clips: tuple[EncodedClip, ...]) -> None:
        for clip in clips:
            self._queued_clips.discard(clip.key)
            if clip.codes is not None:
                self._remember(clip.key, clip.codes)
            for waiting in [each for each in self._encoding.values() if each.needs(clip.key)]:
                self._take_clip(waiting, clip)

    def _take_clip(self, waiting: _WaitingForClips, clip: EncodedClip) -> None:
        request_id = waiting.request.request_id
        if clip.codes is None:
            del self._encoding[request_id]
            self._refuse(request_id, f"a reference clip cannot be encoded: {clip.error}")
            return
        waiting.fill(clip.key, clip.codes)
        if waiting.is_complete:
            del self._encoding[request_id]
            self._admit(waiting)

    def _remember(self, key: str, codes: NDArray[np.int16]) -> None:
        self._clip_codes[key] = codes
        while len(self._clip_codes) > _MAX_CLIPS:
            self._clip_codes.popitem(last=False)

    def _admit(self, waiting: _WaitingForClips) -> None:
        try:
            request = waiting.to_request()
            self._check_tables(request)
            self._scheduler.add_request(request)
        except HiggsAudioError as error:
            self._refuse(waiting.request.request_id, str(error))

    def _check_tables(self, request: Request) -> None:
        """No id may lie outside of its table: on a CPU that fails a step, and a GPU is lost by it."""
        worker = self._executor.info
        _check_range(
            "prompt_token_ids",
            np.delete(request.prompt_token_ids, request.audio_positions),
            worker.vocab_size,
        )
        last_code = max(worker.stream_bos_id, worker.stream_eos_id)
        _check_range("codes of a clip", request.prompt_frames, last_code + 1)

    def _refuse(self, request_id: str, error: str) -> None:
        self._refused.append(
            EngineCoreOutput(request_id, finish_reason=FinishReason.ERROR, error=error)
        )

    # Start

    def _make_info(self, folders: _Folders) -> EngineInfo:
        worker = self._executor.info
        return EngineInfo(
            architecture=worker.architecture,
            num_codebooks=worker.num_codebooks,
            sample_rate=worker.sample_rate,
            hop_length=worker.hop_length,
            can_encode=worker.can_encode,
            codec_fingerprint=worker.codec_fingerprint,
            max_model_len=self._config.model.max_model_len,
            max_num_seqs=worker.max_num_seqs,
            num_kv_blocks=worker.num_kv_blocks,
            max_pinned_blocks=self._scheduler.max_pinned_blocks,
            device=worker.device,
            dtype=worker.dtype,
            tokenizer_folder=str(folders.tokenizer),
            model_folder=str(folders.model),
            embedded=self._config.uses_embedded_model,
            voices_folder=str(folders.voices or ""),
        )

    def _make_scheduler(self) -> Scheduler:
        worker = self._executor.info
        return Scheduler(
            dataclasses.replace(self._config.scheduler, max_num_seqs=worker.max_num_seqs),
            self._config.cache.block_size,
            worker.num_kv_blocks,
            self._config.model.max_model_len,
            enable_prefix_caching=self._config.cache.enable_prefix_caching,
            bos_code=worker.stream_bos_id,
            frame_s=worker.hop_length / worker.sample_rate,
        )

    def _warm_up(self) -> None:
        """Make one utterance, so that the first real one finds everything loaded and allocated."""
        capacity = self._config.model.max_model_len
        num_prompt = min(_WARM_UP_PROMPT, capacity // 2)
        self.add_request(
            EngineCoreRequest(
                request_id=_WARM_UP_ID,
                prompt_token_ids=np.zeros(num_prompt, np.int32).tobytes(),
                sampling_params=SamplingParams(),
                seed=0,
                frame_limit=min(_WARM_UP_FRAMES, capacity - num_prompt),
                limit_reason=FinishReason.LENGTH,
            )
        )
        while self.has_work():
            for output in self.step().outputs:
                if output.finish_reason is FinishReason.ERROR:
                    raise EngineError(f"the engine cannot run: {output.error}")


@dataclass(frozen=True)
class _Folders:
    """Local folders of what is loaded."""

    model: Path
    tokenizer: Path
    codec: Path
    clip_cache: Path
    voices: Path | None  # presets that the model brings along


def _resolve_folders(config: EngineConfig) -> _Folders:
    """Find or download the checkpoints; without ``--model`` those of the embedded model."""
    download_dir = Path(config.model.download_dir) if config.model.download_dir else None
    find = partial(_find_checkpoint, download_dir=download_dir)
    codec_name = config.audio.audio_tokenizer_type
    voices = None
    if config.uses_embedded_model or config.uses_random_model:
        folder = random_checkpoint() if config.uses_random_model else embedded_checkpoint()
        model, codec = folder / "lm", folder / "codec"
        if (folder / "voices").is_dir():
            voices = folder / "voices"
    else:
        assert config.model.model is not None
        model = find("--model", config.model.model, config.model.revision)
        check_architecture(model)  # before a codec is fetched for it
        codec_name = codec_name or DEFAULT_AUDIO_TOKENIZER
    if codec_name is not None:
        revision = config.audio.audio_tokenizer_revision
        codec = find("--audio-tokenizer-type", codec_name, revision)
    tokenizer = model
    if config.model.tokenizer is not None:
        tokenizer = find("--tokenizer", config.model.tokenizer, None)
    cache = config.audio.clip_cache_dir
    clip_cache = Path(cache) if cache else envs.VLLM_CACHE_ROOT / "clips"
    return _Folders(model, tokenizer, codec, clip_cache, voices)


def _find_checkpoint(
    flag: str, name: str, revision: str | None, *, download_dir: Path | None
) -> Path:
    try:
        return resolve(name, revision=revision, download_dir=download_dir)
    except CheckpointError as error:
        raise CheckpointError(f"{flag}: {error}") from error


class _WaitingForClips:
    """A request and the codes of its clips as far as they are known."""

    def __init__(self, request: EngineCoreRequest, pattern: DelayPattern) -> None:
        self.request = request
        self._pattern = pattern
        self._keys = [_clip_key(clip) for clip in request.clips]
        self._codes: list[NDArray[np.int16] | None] = [
            None if clip.codes is None else _read_codes(clip, pattern) for clip in request.clips
        ]

    @property
    def is_complete(self) -> bool:
        return all(codes is not None for codes in self._codes)

    def missing(self) -> list[tuple[bytes, str]]:
        """Samples and key of every clip without codes."""
        pairs = zip(self.request.clips, self._keys, strict=True)
        return [(clip.samples, key) for clip, key in pairs if clip.samples is not None]

    def needs(self, key: str) -> bool:
        return key in self._keys

    def fill(self, key: str, codes: NDArray[np.int16]) -> None:
        """Set the codes of the clips with this key."""
        for index, own in enumerate(self._keys):
            if own == key:
                self._codes[index] = codes

    def to_request(self) -> Request:
        """The scheduler's request, with the delay applied to every clip."""
        num_codebooks = self._pattern.num_codebooks
        frames = [np.empty((0, num_codebooks), np.int16)]
        positions = [np.empty(0, np.int64)]
        for clip, codes in zip(self.request.clips, self._codes, strict=True):
            assert codes is not None
            delayed = self._pattern.apply(codes)
            frames.append(delayed)
            positions.append(np.arange(clip.start, clip.start + len(delayed)))
        return Request.from_core(
            self.request, np.concatenate(frames), np.concatenate(positions).astype(np.int64)
        )


def _check_range(name: str, ids: NDArray[np.int32] | NDArray[np.int16], size: int) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < size:
        raise InvalidRequestError(
            f"{name}: {ids.min()} to {ids.max()}, allowed are 0 to {size - 1}"
        )


def _clip_key(clip: ClipData) -> str:
    """Name of a clip's content; empty for one that brings its codes."""
    if clip.samples is None:
        return ""
    return hashlib.blake2b(clip.samples, digest_size=20).hexdigest()


def _read_codes(clip: ClipData, pattern: DelayPattern) -> NDArray[np.int16]:
    assert clip.codes is not None
    return np.frombuffer(clip.codes, np.int16).reshape(pattern.num_codebooks, clip.num_frames)
