"""Which requests run in a step, which wait, which make room, and when each has ended.

Plans with positions, blocks and frames only: no tensors, no model names and no sockets.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from vllm.config import SchedulerConfig
from vllm.exceptions import InvalidRequestError, PromptTooLongError
from vllm.logger import get_logger
from vllm.outputs import FinishReason
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.row_turns import RowTurns
from vllm.v1.core.sched_output import NewRequestData, PrefillChunk, SchedulerOutput, StepKind
from vllm.v1.engine.messages import (
    STEP_TOKEN_BUCKETS,
    EngineCoreOutput,
    RequestStats,
    SchedulerStats,
)
from vllm.v1.outputs import AudioChunk, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

__all__ = ["Scheduler"]

logger = get_logger(__name__)

_ENDED_BY_EOS = 1


@dataclass
class _Plan:
    """A ``SchedulerOutput`` in the making."""

    new: list[NewRequestData] = field(default_factory=list)
    new_blocks: dict[str, tuple[int, ...]] = field(default_factory=dict)  # req_id -> block ids
    prefill: list[PrefillChunk] = field(default_factory=list)
    swap_out: dict[str, tuple[int, ...]] = field(default_factory=dict)  # req_id -> block ids
    swap_in: dict[str, tuple[int, ...]] = field(default_factory=dict)  # req_id -> block ids


class _StepSizes:
    """How many steps computed how many positions."""

    def __init__(self) -> None:
        self.counts = [0] * (len(STEP_TOKEN_BUCKETS) + 1)
        self.num_tokens = 0

    def count(self, num_positions: int) -> None:
        if num_positions:
            self.counts[bisect_left(STEP_TOKEN_BUCKETS, num_positions)] += 1
            self.num_tokens += num_positions


class Scheduler:
    """Continuous batching with separate, coalesced prefill steps and preemption by swapping.

    One step is ``schedule``, the worker, ``update_from_output``, in this order. Requests may be
    added and finished at any time between two of these calls. The worker may hold the frames of a
    decode step back and hand them out with the output of a later step, in the order of the steps;
    until then they count as made, which is one page early at most.

    Rules:
        * A decode step makes one frame of every running request, unless ``RowTurns`` says that
          some can wait.
        * A prefill step runs when enough prompts wait, or one has waited long enough, or nothing
          can decode; the step after it decodes if anything can.
        * Requests are admitted in the order of priority, then arrival, once the whole prompt and
          the first frame have blocks. Nobody is preempted for an admission.
        * When a running request needs a block and none is free, the least urgent request that
          holds blocks is swapped to the host. It comes back before anybody is admitted.
        * A request never needs more blocks than there are, so the most urgent one always goes on.

    Args:
        config: with ``max_num_seqs`` resolved; it bounds the requests that own a row.
        block_size: positions per block.
        num_blocks: blocks of the KV cache.
        max_model_len: positions of one request, prompt and delayed frames together.
        enable_prefix_caching: share blocks of equal prompt beginnings.
        bos_code: code of the BOS frame; smaller codes are real ones.
        frame_s: seconds that a frame plays.
        clock: seconds, never going back; the clock of ``EngineCoreRequest.arrival_time``.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        block_size: int,
        num_blocks: int,
        max_model_len: int,
        *,
        enable_prefix_caching: bool = True,
        bos_code: int,
        frame_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert config.max_num_seqs > 0, "max_num_seqs must be resolved before"
        self._config = config
        self._max_model_len = max_model_len
        self._bos_code = bos_code
        self._frame_s = frame_s
        self._clock = clock
        self._kv_cache = KVCacheManager(
            num_blocks, block_size, enable_prefix_caching=enable_prefix_caching
        )
        self._requests: dict[str, Request] = {}  # req_id -> every request that has not ended
        self._waiting: list[Request] = []  # most urgent first
        self._swapped: list[Request] = []  # most urgent first
        self._prefilling: dict[str, Request] = {}  # req_id -> Request
        self._running: dict[str, Request] = {}  # req_id -> Request
        self._decode_ids: tuple[str, ...] | None = None  # of _running; None when it has changed
        self._ended_ids: set[str] = set()  # the worker must still drop these
        self._outputs: list[EngineCoreOutput] = []  # written since the last update
        self._last_step_was_prefill = False
        self._num_arrivals = 0
        self._num_preemptions = 0
        self._step_sizes = _StepSizes()
        self._row_turns = RowTurns(frame_s)
        self._step_start_time = 0.0

    # Requests come and go

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            PromptTooLongError: the prompt leaves no room for audio, in the context or the cache.
            InvalidRequestError: a request of this id has not ended yet.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(
                f"request_id={request.request_id!r} is in use; give each request its own",
                param="request_id",
            )
        self._limit_frames(request)
        request.arrival_index = self._num_arrivals
        self._num_arrivals += 1
        request.queued_time = self._clock()
        request.arrival_time = request.arrival_time or request.queued_time
        self._requests[request.request_id] = request
        insort(self._waiting, request, key=_urgency)
        if request.frame_limit <= 1:  # the BOS frame is all there is
            request.record_bos_frame(self._bos_code)
            self._end(request, request.limit_reason)

    def _limit_frames(self, request: Request) -> None:
        num_prompt = request.num_prompt_positions
        capacity = min(self._max_model_len, self._kv_cache.num_positions)
        # Prompt and first frame need blocks, and one more must remain for audio.
        num_blocks = self._kv_cache.num_blocks_for(num_prompt) + 1
        if num_blocks * self._kv_cache.block_size > self._kv_cache.num_positions:
            raise PromptTooLongError(
                f"the prompt has {num_prompt} positions; the KV cache holds "
                f"{self._kv_cache.num_positions}, a block of {self._kv_cache.block_size} of which "
                "is kept for audio",
                param="input",
            )
        if num_prompt >= capacity:
            raise PromptTooLongError(
                f"the prompt has {num_prompt} positions; the context holds "
                f"{self._max_model_len}, prompt and audio together",
                param="input",
            )
        if request.frame_limit > capacity - num_prompt:
            request.frame_limit = capacity - num_prompt
            request.limit_reason = FinishReason.LENGTH

    def finish_requests(
        self, request_ids: Iterable[str], reason: FinishReason, error: str | None = None
    ) -> None:
        """End requests from outside: abort, deadline or error. Ids that have ended are ignored.

        Blocks are free at once; the outputs come with the next ``update_from_output`` and the
        worker is told with the next ``schedule``.
        """
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._end(request, reason, error=error)

    def has_unfinished(self) -> bool:
        """Whether another step has anything to do, be it only to tell of an end."""
        return bool(self._requests or self._ended_ids or self._outputs)

    def stats(self) -> SchedulerStats:
        num_waiting = len(self._waiting) + len(self._swapped)
        return SchedulerStats(
            num_running=self._num_rows,
            num_waiting=num_waiting,
            num_finishing=len(self._requests) - num_waiting - self._num_rows,
            kv_cache_usage=self._kv_cache.usage,
            num_pinned_blocks=self._kv_cache.num_pinned_blocks,
            prefix_cache_queries=self._kv_cache.num_prefix_queries,
            prefix_cache_hits=self._kv_cache.num_prefix_hits,
            num_preemptions=self._num_preemptions,
            step_token_counts=tuple(self._step_sizes.counts),
            num_step_tokens=self._step_sizes.num_tokens,
        )

    @property
    def max_pinned_blocks(self) -> int:
        """Most blocks that ``Request.num_pinned_positions`` may keep."""
        return self._kv_cache.max_pinned_blocks

    @property
    def _num_rows(self) -> int:
        return len(self._running) + len(self._prefilling)

    # A step is planned

    def schedule(self) -> SchedulerOutput:
        """Plan the next step; ``StepKind.IDLE`` when there is nothing to compute."""
        plan = _Plan()
        finished = frozenset(self._ended_ids)
        self._ended_ids.clear()
        # Blocks for frames come first: whoever enters below is then never swapped out at once.
        self._extend_running(plan)
        self._resume_swapped(plan)
        if self._is_prefill_turn():
            self._plan_prefill(plan)
        self._last_step_was_prefill = bool(plan.prefill)
        decode = () if plan.prefill else self._decoding_ids()
        for request_id in decode:
            self._running[request_id].num_frames_in_flight += 1
        step = SchedulerOutput(
            step_kind=_step_kind(plan, decode),
            new=tuple(plan.new),
            new_blocks=plan.new_blocks,
            prefill=tuple(plan.prefill),
            decode=decode,
            swap_out=plan.swap_out,
            swap_in=plan.swap_in,
            finished=finished,
        )
        self._step_sizes.count(step.num_positions)
        self._step_start_time = self._clock()
        return step

    def _extend_running(self, plan: _Plan) -> None:
        needing = [r for r in self._running.values() if self._kv_cache.needs_block(r)]
        for request in sorted(needing, key=_urgency):
            while request.status is RequestStatus.RUNNING:
                blocks = self._kv_cache.allocate_slots(request, request.num_slots_needed)
                if blocks is not None:
                    plan.new_blocks[request.request_id] = blocks
                    break
                self._preempt_one(plan)

    def _preempt_one(self, plan: _Plan) -> None:
        holders = [*self._running.values(), *self._prefilling.values()]
        victim = max(holders, key=_urgency)
        assert victim.request_id not in plan.new_blocks, "the most urgent are extended first"
        num_written = self._kv_cache.num_blocks_for(victim.num_computed_positions)
        plan.swap_out[victim.request_id] = self._kv_cache.blocks_of(victim)[:num_written]
        self._kv_cache.free_blocks(victim)
        self._leave_queue(victim)
        victim.status = RequestStatus.SWAPPED
        insort(self._swapped, victim, key=_urgency)
        victim.num_preemptions += 1
        self._num_preemptions += 1
        logger.debug("swapped out", extra={"request_id": victim.request_id})

    def _resume_swapped(self, plan: _Plan) -> None:
        while self._swapped and self._num_rows < self._config.max_num_seqs:
            request = self._swapped[0]
            if request.request_id in plan.swap_out:
                return
            blocks = self._kv_cache.allocate_slots(
                request, request.num_slots_needed, num_reserved_blocks=self._num_rows
            )
            if blocks is None:
                return
            num_written = self._kv_cache.num_blocks_for(request.num_computed_positions)
            plan.swap_in[request.request_id] = blocks[:num_written]
            if len(blocks) > num_written:
                plan.new_blocks[request.request_id] = blocks[num_written:]
            self._leave_queue(request)
            self._enter_row(request)

    def _is_prefill_turn(self) -> bool:
        if not self._running:
            return True
        if self._last_step_was_prefill:
            return False
        return bool(self._prefilling) or self._is_prefill_due()

    def _is_prefill_due(self) -> bool:
        if not self._waiting:
            return False
        config = self._config
        if len(self._waiting) >= config.prefill_min_requests:
            return True
        if sum(r.num_prompt_positions for r in self._waiting) >= config.prefill_min_tokens:
            return True
        waited_s = self._clock() - min(r.queued_time for r in self._waiting)
        return waited_s * 1000 >= config.prefill_max_wait_ms

    def _plan_prefill(self, plan: _Plan) -> None:
        budget = self._config.max_num_batched_tokens
        for request in self._prefilling.values():
            budget -= self._plan_chunk(plan, request, budget)
        while budget > 0:
            admitted = self._admit_next(plan)
            if admitted is None:
                return
            budget -= self._plan_chunk(plan, admitted, budget)

    def _plan_chunk(self, plan: _Plan, request: Request, budget: int) -> int:
        remaining = request.num_prompt_positions - request.num_prefilled
        length = min(remaining, budget)
        if length > 0:
            plan.prefill.append(
                PrefillChunk(
                    request.request_id, request.num_prefilled, length, is_last=length == remaining
                )
            )
        return length

    def _admit_next(self, plan: _Plan) -> Request | None:
        if not self._waiting or self._swapped or self._num_rows >= self._config.max_num_seqs:
            return None
        request = self._waiting[0]
        blocks = self._kv_cache.allocate_prompt(request, num_reserved_blocks=self._num_rows)
        if blocks is None:
            return None
        plan.new.append(_new_request_data(request))
        plan.new_blocks[request.request_id] = blocks
        request.prefill_start_time = self._clock()
        self._leave_queue(request)
        self._enter_row(request)
        return request

    def _enter_row(self, request: Request) -> None:
        if not request.is_prefilled:
            request.status = RequestStatus.PREFILLING
            self._prefilling[request.request_id] = request
            return
        request.status = RequestStatus.RUNNING
        self._running[request.request_id] = request
        self._decode_ids = None
        if request.num_frames == 0:
            request.record_bos_frame(self._bos_code)
            request.decode_start_time = self._clock()

    def _leave_queue(self, request: Request) -> None:
        """Take the request out of wherever its status says that it is."""
        match request.status:
            case RequestStatus.WAITING:
                self._waiting.remove(request)
            case RequestStatus.SWAPPED:
                self._swapped.remove(request)
            case RequestStatus.PREFILLING:
                del self._prefilling[request.request_id]
            case RequestStatus.RUNNING:
                del self._running[request.request_id]
                self._decode_ids = None

    def _decoding_ids(self) -> tuple[str, ...]:
        if self._decode_ids is None:
            self._decode_ids = tuple(self._running)
        chosen = self._row_turns.choose(self._running.values(), self._clock())
        if chosen is None:
            return self._decode_ids
        return tuple(request.request_id for request in chosen)

    # A step has run

    def update_from_output(
        self, plan: SchedulerOutput, output: ModelRunnerOutput
    ) -> list[EngineCoreOutput]:
        """Record what a step made; returns new audio and ends, also those since the last call."""
        if output.frames is not None:
            self._row_turns.record(self._clock() - self._step_start_time)
        for request_id, error in output.errors.items():
            self.finish_requests((request_id,), FinishReason.ERROR, error)
        for chunk in plan.prefill:
            self._record_prefill(chunk)
        if output.frames is not None:
            self._record_frames(output)
        for audio in output.chunks:
            self._record_audio(audio)
        outputs, self._outputs = self._outputs, []
        return outputs

    def _record_prefill(self, chunk: PrefillChunk) -> None:
        request = self._prefilling.get(chunk.request_id)
        if request is None:
            return
        request.num_prefilled = chunk.start + chunk.length
        self._kv_cache.publish(request)
        if chunk.is_last:
            self._leave_queue(request)
            self._enter_row(request)

    def _record_frames(self, output: ModelRunnerOutput) -> None:
        assert output.frames is not None
        assert output.finish is not None
        assert len(output.request_ids) == output.frames.shape[0] == output.finish.shape[0]
        codes = np.ascontiguousarray(output.frames, np.int16).tobytes()
        width = len(codes) // max(len(output.request_ids), 1)
        for row, request_id in enumerate(output.request_ids):
            request = self._requests.get(request_id)  # running, or swapped out since
            if request is not None:
                request.num_frames_in_flight -= 1
                request.append_frame(codes[row * width : (row + 1) * width])
        for row in np.flatnonzero(output.finish).tolist():
            request = self._requests.get(output.request_ids[row])
            if request is not None:
                by_eos = output.finish[row] == _ENDED_BY_EOS
                self._end_generation(request, FinishReason.STOP if by_eos else request.limit_reason)

    def _end_generation(self, request: Request, reason: FinishReason) -> None:
        """All frames are made; the request stays until the last audio has come."""
        self._kv_cache.free(request)
        self._leave_queue(request)
        request.status = RequestStatus.FINISHING
        request.finish_reason = reason
        request.decode_end_time = self._clock()

    def _record_audio(self, chunk: AudioChunk) -> None:
        request = self._requests.get(chunk.request_id)
        if request is None:
            return
        if request.player is not None:
            request.player.feed(self._clock(), chunk.num_frames * self._frame_s)
        if chunk.error is not None:
            self._end(request, FinishReason.ERROR, error=chunk.error)
            return
        if chunk.final:
            self._record_last_audio(request, chunk)
            return
        # NOTE: frames beyond the audio may yet be cut by the silence guard, so they stay here.
        num_covered = request.num_real_frames_sent + chunk.num_frames + request.num_codebooks
        self._outputs.append(
            EngineCoreOutput(
                request.request_id,
                audio=chunk.samples.tobytes(),
                codes=self._take_codes(request, chunk.num_frames),
                delayed_codes=_take_delayed_codes(request, num_covered),
            )
        )

    def _record_last_audio(self, request: Request, chunk: AudioChunk) -> None:
        is_cut = chunk.cut_frame is not None
        assert is_cut or request.status is RequestStatus.FINISHING, (
            f"{request.request_id}: last audio while {request.status}"
        )
        codes = self._take_codes(request, chunk.num_frames)
        if chunk.cut_frame is not None:
            request.truncate_frames(chunk.cut_frame + request.num_codebooks)
            request.finish_reason = FinishReason.SILENCE
        assert request.finish_reason is not None
        self._end(
            request,
            request.finish_reason,
            audio=chunk.samples.tobytes(),
            codes=codes,
            worker_has_dropped=request.status is RequestStatus.FINISHING,
        )

    def _take_codes(self, request: Request, num_frames: int) -> bytes:
        start = request.num_real_frames_sent
        request.num_real_frames_sent += num_frames
        real = request.real_frames(start, start + num_frames, num_codes=self._bos_code)
        return real.tobytes()

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        error: str | None = None,
        audio: bytes = b"",
        codes: bytes = b"",
        worker_has_dropped: bool = False,
    ) -> None:
        """The one way out: frees the blocks and writes the request's last output."""
        if request.status is not RequestStatus.WAITING and not worker_has_dropped:
            self._ended_ids.add(request.request_id)
        self._leave_queue(request)
        self._kv_cache.free(request)
        del self._requests[request.request_id]
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        self._outputs.append(
            EngineCoreOutput(
                request.request_id,
                audio=audio,
                codes=codes,
                delayed_codes=_take_delayed_codes(request, request.num_frames),
                finish_reason=reason,
                error=error,
                stats=_request_stats(request, self._clock()),
            )
        )

    def check_integrity(self) -> None:
        """Assert that queues, rows and blocks agree. Costs time; for tests and idle moments."""
        by_status = {
            RequestStatus.WAITING: self._waiting,
            RequestStatus.SWAPPED: self._swapped,
            RequestStatus.PREFILLING: list(self._prefilling.values()),
            RequestStatus.RUNNING: list(self._running.values()),
        }
        for status, members in by_status.items():
            expected = {i for i, r in self._requests.items() if r.status is status}
            assert {r.request_id for r in members} == expected, status
            assert len(members) == len(expected), f"{status}: a request is queued twice"
        assert all(r.status is not RequestStatus.FINISHED for r in self._requests.values())
        assert self._num_rows <= self._config.max_num_seqs, "more requests than rows"
        for queue in (self._waiting, self._swapped):
            assert queue == sorted(queue, key=_urgency), "a queue is out of order"
        assert self._decode_ids is None or self._decode_ids == tuple(self._running)
        self._kv_cache.check_integrity(self._requests.values())


def _urgency(request: Request) -> tuple[int, int]:
    return request.urgency


def _step_kind(plan: _Plan, decode: tuple[str, ...]) -> StepKind:
    if plan.prefill:
        return StepKind.PREFILL
    return StepKind.DECODE if decode else StepKind.IDLE


def _new_request_data(request: Request) -> NewRequestData:
    return NewRequestData(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        prompt_frames=request.prompt_frames,
        audio_positions=request.audio_positions,
        sampling_params=request.sampling_params,
        seed=request.seed,
        frame_limit=request.frame_limit,
        max_silence_frames=request.max_silence_frames,
        listener=request.listener,
        num_cached_positions=request.num_cached_positions,
    )


def _request_stats(request: Request, now: float) -> RequestStats:
    """Timings of a request that ends; a phase that it never left counts up to ``now``."""
    prefill_start = _first_known(request.prefill_start_time, now)
    decode_start = _first_known(request.decode_start_time, now)
    decode_end = _first_known(request.decode_end_time, now)
    return RequestStats(
        queue_time_s=max(prefill_start - request.arrival_time, 0.0),
        prefill_time_s=decode_start - prefill_start,
        decode_time_s=decode_end - decode_start,
        num_cached_positions=request.num_cached_positions,
        num_preemptions=request.num_preemptions,
    )


def _first_known(time_s: float | None, now: float) -> float:
    return now if time_s is None else time_s


def _take_delayed_codes(request: Request, stop: int) -> bytes:
    """Delayed frames not sent yet, up to ``stop``."""
    start = request.num_delayed_frames_sent
    frames = request.delayed_frames(start, max(start, stop))
    request.num_delayed_frames_sent = start + frames.shape[0]
    return frames.tobytes()
