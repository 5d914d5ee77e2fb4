"""Decodes the frames of all requests to samples beside the model's steps, and encodes clips.

Knows codecs, windows and request ids; knows nothing of prompts, sampling or scheduling.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from vllm.logger import get_logger
from vllm.model_executor.codecs.clip_cache import ClipCache
from vllm.model_executor.codecs.streaming import DEFAULT_RAMP, Window, WindowPlan
from vllm.player import Listener, VirtualPlayer
from vllm.v1.outputs import AudioChunk, CodecStats, EncodedClip
from vllm.v1.worker.cuda_graphs import GraphBackend
from vllm.v1.worker.window_decoder import WindowDecoder

if TYPE_CHECKING:
    from vllm.model_executor.codecs.interface import Codec

__all__ = ["MAX_CUDA_BATCH", "CodecResults", "CodecRunner"]

logger = get_logger(__name__)

_SILENCE_MEAN_SQUARE = 1e-6  # -60 dBFS
MAX_CUDA_BATCH = 32  # windows
_PATIENCE_S = 10.0  # for which a window may stand behind others that are due sooner
_CLIP_PATIENCE_S = 1.0  # the same for clips: somebody waits for first audio


@dataclass(frozen=True)
class CodecResults:
    """What became ready since the last poll, each request's chunks in order."""

    chunks: list[AudioChunk] = field(default_factory=list)
    clips: list[EncodedClip] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.chunks or self.clips)


class CodecRunner:
    """One codec, shared by all requests of an engine.

    A request's samples do not depend on the others: its windows follow from its own frame count
    (``WindowPlan``). On a CPU each is decoded alone, because a convolution's bits may change with
    the batch; on CUDA windows of equal shape share a call.

    Requests take turns, one window each, so none waits for another to end. First comes the window
    whose listener would hear silence soonest; what nobody listens to comes in the order of arrival,
    and so does what has waited for ``_PATIENCE_S``, a clip for ``_CLIP_PATIENCE_S``. When a
    listener is served, the next window is due later than all that was overdue, so everything gets
    its turn.

    Args:
        codec: where its weights are, the work is done.
        ramp: frames of the first, second, ... chunk; the last repeats.
        clip_cache: where codes of clips are kept; None for memory only.
        threaded: work on an own thread. Otherwise ``poll`` does the work.
        num_threads: cores that the own thread may use for one operator; None for torch's setting.
            The caller's own setting stays as it was. Fewer leave cores to the model's steps.
        graphs: record the windows that every stream has, now; None records nothing.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        ramp: tuple[int, ...] = DEFAULT_RAMP,
        clip_cache: ClipCache | None = None,
        threaded: bool = True,
        num_threads: int | None = None,
        graphs: GraphBackend | None = None,
    ) -> None:
        self._device = next(codec.parameters()).device
        self._decoder = WindowDecoder(codec, self._device)
        self._encoder = _ClipEncoder(codec, self._device, clip_cache or ClipCache())
        self._codec = codec
        # With recorded windows the last ones of a stream should be such too: launched one operation
        # after the other, shapes that hardly occur twice would cost more than all others together.
        self._plan = WindowPlan(codec.context_frames, ramp, widens_last=graphs is not None)
        if graphs is not None:
            self._decoder.record(graphs, self._plan.usual_shapes, max_batch=MAX_CUDA_BATCH)
        self._max_batch = MAX_CUDA_BATCH if self._device.type == "cuda" else 1
        # Everything below is guarded by this lock, which no torch operation holds.
        self._changed = threading.Condition()
        self._streams: dict[str, _Stream] = {}  # request_id -> state, until its last chunk
        self._ready: list[tuple[_Stream, Window]] = []
        self._clips: deque[_Clip] = deque()
        self._chunks: list[AudioChunk] = []
        self._encoded: list[EncodedClip] = []
        self._num_running = 0
        self._stats = CodecStats()
        self._stopping = False
        self._thread = self._start_thread(num_threads) if threaded else None

    def open(
        self,
        request_id: str,
        *,
        max_silence_frames: int | None,
        listener: Listener | None = None,
    ) -> None:
        """Begin a request.

        Args:
            request_id: not in use.
            max_silence_frames: as many in a row end it; None switches that off.
            listener: in time for whom its windows are decoded.
        """
        with self._changed:
            if request_id in self._streams:
                raise ValueError(f"request {request_id!r} is already open")
            stream = _Stream(request_id, max_silence_frames)
            if listener is not None:
                stream.player = VirtualPlayer(listener.speed, dry_at=listener.dry_at)
            self._streams[request_id] = stream

    def push(self, request_id: str, frames: NDArray[np.int16], *, final: bool) -> None:
        """Add real codes, delay undone, int16 [K, n]; n may be 0 with ``final``.

        Codes that the codec cannot have end the request with an error chunk. A request that has
        ended by itself (cut or failed) or was closed takes no more frames; they are dropped.
        """
        with self._changed:
            stream = self._streams.get(request_id)
            if stream is None or stream.final:
                return
            problem = self._problem_of(frames)
            if problem is not None:
                self._fail(stream, problem)
            else:
                stream.append(frames, final=final)
                self._queue_next(stream)
            self._changed.notify_all()

    def next_due(self, num_frames: int) -> int:
        """Frame count above ``num_frames`` at which a request's next window can be decoded."""
        return self._plan.next_due(num_frames)

    def close(self, request_id: str) -> None:
        """Forget a request: queued work and unread chunks are dropped. Unknown ids are fine."""
        with self._changed:
            self._end(request_id)
            self._chunks = [c for c in self._chunks if c.request_id != request_id]

    def encode(self, key: str, samples: NDArray[np.float32]) -> None:
        """Queue a mono clip, float32 [n] at the codec's rate; zeros fill up its last frame."""
        with self._changed:
            self._clips.append(_Clip(key, samples, time.monotonic() + _CLIP_PATIENCE_S))
            self._changed.notify_all()

    def poll(self, timeout_s: float = 0.0) -> CodecResults:
        """Results so far; waits up to ``timeout_s`` for the first if there is work to wait for."""
        if self._thread is None:
            while not self._has_results() and self._work_once():
                pass
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._has_results() and self._is_working():
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    break
                self._changed.wait(remaining)
            results = CodecResults(self._chunks, self._encoded)
            self._chunks, self._encoded = [], []
        return results

    def has_work(self) -> bool:
        """Whether a window or clip is due or running, or a result waits to be polled."""
        with self._changed:
            return self._has_results() or self._is_working()

    def stats(self) -> CodecStats:
        """Counts, and how many windows wait now."""
        with self._changed:
            return replace(self._stats, num_waiting=len(self._ready))

    def reset_stats(self) -> None:
        """Count from zero again."""
        with self._changed:
            self._stats = CodecStats()

    def shutdown(self) -> None:
        """Stop after the operation that runs now; queued work is dropped."""
        with self._changed:
            self._stopping = True
            self._streams.clear()
            self._ready.clear()
            self._clips.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    # --- bookkeeping, called with the lock held ---

    def _has_results(self) -> bool:
        return bool(self._chunks or self._encoded)

    def _is_working(self) -> bool:
        return bool(self._ready or self._clips or self._num_running)

    def _problem_of(self, frames: NDArray[np.int16]) -> str | None:
        size, num_codebooks = self._codec.codebook_size, self._codec.num_codebooks
        if frames.ndim != 2 or frames.shape[0] != num_codebooks:
            return f"frames of shape {list(frames.shape)}, expected [{num_codebooks}, n]"
        if frames.size and (frames.min() < 0 or frames.max() >= size):
            return f"codes {frames.min()}..{frames.max()}, allowed are 0..{size - 1}"
        return None

    def _queue_next(self, stream: _Stream) -> None:
        """Queue the stream's next window if it is due and none is queued or running."""
        if stream.is_busy:
            return
        window = self._plan.next_window(stream.emitted, stream.num_frames, final=stream.final)
        if window is not None:
            stream.is_busy = True
            stream.queued_at = time.monotonic()
            self._ready.append((stream, window))
        elif stream.final:  # nothing was left to decode
            empty = np.empty(0, np.float32)
            self._chunks.append(AudioChunk(stream.request_id, empty, 0, final=True))
            self._end(stream.request_id)

    def _end(self, request_id: str) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._ready = [item for item in self._ready if item[0] is not stream]

    def _fail(self, stream: _Stream, error: str) -> None:
        chunk = AudioChunk(stream.request_id, np.empty(0, np.float32), 0, final=True, error=error)
        self._chunks.append(chunk)
        self._end(stream.request_id)

    def _take_windows(self) -> list[tuple[_Stream, Window]]:
        """The window due first, with others of its shape as far as a batch holds them."""
        if not self._ready:
            return []
        self._ready.sort(key=_deadline)
        if self._clips and self._clips[0].deadline < _deadline(self._ready[0]):
            return []
        shape = self._decoder.shape_of(self._ready[0][1])
        batch: list[tuple[_Stream, Window]] = []
        others: list[tuple[_Stream, Window]] = []
        for item in self._ready:
            fits = len(batch) < self._max_batch and self._decoder.shape_of(item[1]) == shape
            (batch if fits else others).append(item)
        self._ready = others
        return batch

    def _deliver(self, stream: _Stream, window: Window, samples: NDArray[np.float32]) -> None:
        """Pass on the samples of a window: float32 [num_emitted * hop]."""
        if self._streams.get(stream.request_id) is not stream:
            return
        stream.is_busy = False
        stream.advance(window.emit_stop, num_kept=self._plan.num_kept)
        hop = self._codec.hop_length
        cut_frame = stream.find_cut(samples.reshape(-1, hop), first_frame=window.emit_start)
        if cut_frame is not None:
            samples = samples[: (cut_frame - window.emit_start) * hop]
        if stream.player is not None:
            stream.player.feed(time.monotonic(), len(samples) / self._codec.sample_rate)
        is_last = stream.final and stream.emitted == stream.num_frames
        final = cut_frame is not None or is_last
        self._chunks.append(
            AudioChunk(stream.request_id, samples, len(samples) // hop, final, cut_frame)
        )
        if final:
            self._end(stream.request_id)
        else:
            self._queue_next(stream)

    # --- work, on the own thread or within poll ---

    def _start_thread(self, num_threads: int | None) -> threading.Thread:
        started = threading.Event()
        thread = threading.Thread(
            target=self._run, args=(num_threads, started), name="codec", daemon=True
        )
        before = torch.get_num_threads()
        thread.start()
        started.wait()
        if num_threads is not None:
            # NOTE: part of torch's setting is per thread and part per process; setting it again
            # here gives the process-wide part back to this, the model's, thread.
            torch.set_num_threads(before)
        return thread

    def _run(self, num_threads: int | None, started: threading.Event) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        started.set()
        while True:
            with self._changed:
                while not (self._stopping or self._ready or self._clips):
                    self._changed.wait()
                if self._stopping:
                    return
            self._work_once()

    def _work_once(self) -> bool:
        """Decode one batch of windows or encode one clip. False when nothing was due."""
        with self._changed:
            batch = self._take_windows()
            clip = None if batch or not self._clips else self._clips.popleft()
            if not batch and clip is None:
                return False
            inputs = [(stream.frames_of(window), window) for stream, window in batch]
            self._num_running += 1
        try:
            if clip is not None:
                self._encode_clip(clip.key, clip.samples)
            else:
                self._decode_batch(batch, inputs)
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()
        return True

    def _decode_batch(
        self,
        batch: list[tuple[_Stream, Window]],
        inputs: list[tuple[NDArray[np.int16], Window]],
    ) -> None:
        started_at = time.perf_counter()
        try:
            outputs = self._decoder.decode(inputs)
        except Exception as error:  # the thread outlives whatever one request brings about
            if len(batch) == 1:
                logger.exception("decode failed", extra={"request_id": batch[0][0].request_id})
                with self._changed:
                    if self._streams.get(batch[0][0].request_id) is batch[0][0]:
                        self._fail(batch[0][0], f"decode failed: {error}")
                return
            for item, one in zip(batch, inputs, strict=True):
                self._decode_batch([item], [one])
            return
        with self._changed:
            self._stats = replace(
                self._stats,
                num_windows=self._stats.num_windows + len(batch),
                decode_time_s=self._stats.decode_time_s + time.perf_counter() - started_at,
            )
            for (stream, window), samples in zip(batch, outputs, strict=True):
                self._deliver(stream, window, samples)

    def _encode_clip(self, key: str, samples: NDArray[np.float32]) -> None:
        started_at = time.perf_counter()
        is_known = False
        try:
            with self._decoder.on_stream():  # beside the steps, not between them
                codes, is_known = self._encoder.encode(samples)
            encoded = EncodedClip(key, codes)
        except Exception as error:  # as above: it ends this clip only
            logger.warning("cannot encode clip %s: %s", key, error)
            encoded = EncodedClip(key, None, error=str(error) or type(error).__name__)
        with self._changed:
            self._stats = replace(
                self._stats,
                num_clips=self._stats.num_clips + (not is_known),
                num_known_clips=self._stats.num_known_clips + is_known,
                encode_time_s=self._stats.encode_time_s + time.perf_counter() - started_at,
            )
            self._encoded.append(encoded)


@dataclass(frozen=True, eq=False)
class _Clip:
    """A reference clip that waits to be encoded."""

    key: str
    samples: NDArray[np.float32]  # [num_samples]
    deadline: float


class _Stream:
    """Frames of one request that windows still need, and its run of silence."""

    def __init__(self, request_id: str, max_silence_frames: int | None) -> None:
        self.request_id = request_id
        self.emitted = 0
        self.final = False
        self.is_busy = False  # a window is queued or running
        self.queued_at = 0.0  # when the last one was
        self.player: VirtualPlayer | None = None  # of the listener
        self._max_silence_frames = max_silence_frames
        self._num_silent = 0  # silent frames in a row, up to the last emitted one
        self._first = 0  # number of the first frame kept
        self._frames: NDArray[np.int16] | None = None  # [K, n]

    @property
    def deadline(self) -> float:
        """When its queued window should be decoded."""
        patient = self.queued_at + _PATIENCE_S
        if self.player is None or self.player.dry_at is None:
            return patient
        return min(patient, self.player.dry_at)

    @property
    def num_frames(self) -> int:
        """Frames that came so far."""
        return self._first + (0 if self._frames is None else self._frames.shape[1])

    def append(self, frames: NDArray[np.int16], *, final: bool) -> None:
        kept = [frames] if self._frames is None else [self._frames, frames]
        self._frames = np.concatenate(kept, axis=1)
        self.final = final

    def frames_of(self, window: Window) -> NDArray[np.int16]:
        """Codes int16 [K, window.num_frames], a copy."""
        assert self._frames is not None
        return self._frames[:, window.start - self._first : window.stop - self._first].copy()

    def advance(self, emitted: int, *, num_kept: int) -> None:
        """Note what is out, and let go of frames that no later window reaches."""
        assert self._frames is not None
        self.emitted = emitted
        first = max(0, emitted - num_kept)
        self._frames = self._frames[:, first - self._first :]
        self._first = first

    def find_cut(self, frames: NDArray[np.float32], *, first_frame: int) -> int | None:
        """Frames of the whole to keep when silence lasted too long. ``frames`` is [n, hop]."""
        if self._max_silence_frames is None:
            return None
        loudness = np.square(frames, dtype=np.float64).mean(axis=1)
        for index, is_silent in enumerate((loudness < _SILENCE_MEAN_SQUARE).tolist()):
            self._num_silent = self._num_silent + 1 if is_silent else 0
            if self._num_silent >= self._max_silence_frames:
                return first_frame + index + 1
        return None


def _deadline(item: tuple[_Stream, Window]) -> float:
    return item[0].deadline


class _ClipEncoder:
    """Codes of reference clips, from the cache where it has them."""

    def __init__(self, codec: Codec, device: torch.device, cache: ClipCache) -> None:
        self._codec = codec
        self._device = device
        self._cache = cache

    @torch.inference_mode()
    def encode(self, samples: NDArray[np.float32]) -> tuple[NDArray[np.int16], bool]:
        """Samples [n] to codes int16 [K, ceil(n / hop)], and whether these were known already."""
        samples = np.ascontiguousarray(samples, dtype=np.float32)
        key = ClipCache.key(samples, self._codec.encoder_fingerprint)
        codes = self._cache.get(key)
        is_known = codes is not None
        if codes is None:
            padded = np.pad(samples, (0, -len(samples) % self._codec.hop_length))
            encoded = self._codec.encode(torch.from_numpy(padded)[None].to(self._device))
            codes = encoded[0].cpu().numpy().astype(np.int16)
            self._cache.put(key, codes)
        return codes, is_known
