"""One step on the device, for any model: rows, pages, forward pass, sampling, codec hand-over.

What belongs to a family is behind ``ModelState``; who runs when is the scheduler's decision. The
name is history: the same runner works on a CPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm.exceptions import EngineDeadError
from vllm.kernels.attention import reads_unwritten
from vllm.kernels.cache import clear_blocks
from vllm.logger import get_logger
from vllm.model_executor.framing import DelayFraming
from vllm.model_executor.heads import FrameStatus
from vllm.model_executor.models.interface import SpeechModel
from vllm.platforms import copy_to_device, is_lost
from vllm.v1.core.sched_output import NewRequestData, SchedulerOutput, StepKind
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.codec_runner import CodecRunner
from vllm.v1.worker.decoder import Decoder, FrameGetter, RowOwners
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.model_state import ModelState
from vllm.v1.worker.prefill import Prefiller, PromptSlice

__all__ = ["GPUModelRunner"]

logger = get_logger(__name__)

_PENDING_FRAMES = 64  # frames of one row kept before they go to the codec


@dataclass(eq=False)
class _Running:
    """A request that owns a row."""

    data: NewRequestData
    row: int
    framing: DelayFraming


@dataclass(frozen=True, eq=False)
class _Swapped:
    """A request whose row and pages lie on the host."""

    running: _Running
    # Per layer, of any number type: uint8 [2, num_blocks, num_kv_heads, block_size, bytes of a head]
    pages: list[Tensor]
    state: Any
    num_positions: int
    pending: NDArray[np.int16]  # [n, num_codebooks], frames that the codec has not seen


@dataclass(frozen=True, eq=False)
class _DecodeBatch:
    """What stays the same while the same requests are decoded."""

    planned: tuple[str, ...]  # request ids, maybe with some that have ended
    owners: tuple[_Running, ...]  # [num_reqs]
    request_ids: tuple[str, ...]  # [num_reqs]
    rows: NDArray[np.int64]  # [num_reqs]

    @classmethod
    def of(cls, planned: tuple[str, ...], owners: tuple[_Running, ...]) -> _DecodeBatch:
        request_ids = tuple(running.data.request_id for running in owners)
        rows = np.array([running.row for running in owners], np.int64)
        return cls(planned, owners, request_ids, rows)


@dataclass(frozen=True, eq=False)
class _Frames:
    """What a decode step made, for the requests that still own their rows."""

    request_ids: tuple[str, ...]
    frames: NDArray[np.int16]  # [num_reqs, num_codebooks]
    status: NDArray[np.uint8]  # [num_reqs]


class GPUModelRunner:
    """Executes the scheduler's steps.

    A decoder that works ahead still has a step under way when ``execute_model`` returns, and its
    frames come with the output of a later call. Whoever has lost the row by then, because the
    step before ended it or the scheduler did, gets nothing of them.

    Args:
        model: loaded, on ``device``.
        state: per-row state of the model's family, on ``device``, one row more than ``max_num_seqs``.
        codec: decodes frames beside the steps.
        kv_caches: one per layer, [2, num_blocks + 1, num_kv_heads, block_size, head_dim], for
            ``num_blocks`` that the scheduler knows of.
        make_prefiller: makes what takes prefill steps; called after ``make_decoder``.
        make_decoder: makes what takes decode steps.
        has_mirrors: both read block tables of the device's own, see ``BlockTable``.
        block_size: positions per block.
        max_num_seqs: rows that requests can own.
        device: of model, state and caches.
    """

    def __init__(
        self,
        model: SpeechModel,
        state: ModelState,
        codec: CodecRunner,
        kv_caches: Sequence[Tensor],
        *,
        make_prefiller: Callable[[RowOwners], Prefiller],
        make_decoder: Callable[[RowOwners], Decoder],
        has_mirrors: bool,
        block_size: int,
        max_num_seqs: int,
        device: torch.device,
    ) -> None:
        self._state = state
        self._codec = codec
        self._kv_caches = kv_caches
        self._has_mirrors = has_mirrors
        self._clears_blocks = reads_unwritten(kv_caches[0])
        self._block_size = block_size
        self._device = device
        max_blocks = -(-model.spec.max_model_len // block_size)
        self._batch = InputBatch(max_num_seqs, model.spec.codebook_size, device)
        self._block_table = BlockTable(
            max_num_seqs + 1, max_blocks, device, is_mirrored=has_mirrors
        )
        self._requests: dict[str, _Running] = {}  # req_id -> owner of a row
        self._swapped: dict[str, _Swapped] = {}  # req_id -> what lies on the host
        self._num_positions = np.zeros(max_num_seqs, np.int64)  # [rows], keys and values written
        self._decode_batch: _DecodeBatch | None = None
        self._in_flight: deque[tuple[_DecodeBatch, FrameGetter]] = deque()  # oldest first
        owners = RowOwners(
            model=model,
            state=state,
            kv_caches=kv_caches,
            block_size=block_size,
            block_table=self._block_table,
            batch=self._batch,
            positions=self._num_positions,
        )
        self._decoder = make_decoder(owners)
        self._prefiller = make_prefiller(owners)
        # Frames on their way to the codec, and the number of them at which a window is due.
        shape = (max_num_seqs, _PENDING_FRAMES, state.num_codebooks)
        self._pending = np.zeros(shape, np.int16)
        self._num_pending = np.zeros(max_num_seqs, np.int64)  # [rows]
        self._num_due = np.zeros(max_num_seqs, np.int64)  # [rows]

    @torch.inference_mode()
    def execute_model(self, plan: SchedulerOutput, *, wait_s: float = 0.0) -> ModelRunnerOutput:
        """Run one step.

        Args:
            plan: what to do.
            wait_s: how long an idle step may wait for the codec.

        Returns:
            Frames of the step, or of an earlier one, and whatever the codec has ready.

        Raises:
            EngineDeadError: the device takes no work any more.
        """
        made: list[_Frames] = []
        errors: dict[str, str] = {}
        try:
            if plan.swap_out:  # what leaves must be whole
                made += self._take_frames(0)
            self._update_states(plan)
            if plan.step_kind is StepKind.PREFILL:
                self._prefill(plan)
            elif plan.step_kind is StepKind.DECODE:
                self._launch(plan.decode)
            is_decode = plan.step_kind is StepKind.DECODE
            made += self._take_frames(self._decoder.depth - 1 if is_decode else 0)
        except Exception as error:
            if is_lost(self._device):
                # Every later step would fail too, and whoever started this process can do better.
                raise EngineDeadError(f"the device is lost: {error}") from error
            # One step, one tensor program: all of its requests share the failure, no other does.
            logger.exception("a %s step failed", plan.step_kind)
            launched = [each for batch, _ in self._in_flight for each in batch.request_ids]
            self._in_flight.clear()
            affected = (*(chunk.request_id for chunk in plan.prefill), *plan.decode, *launched)
            errors = dict.fromkeys(affected, f"the step failed: {error}")
        results = self._codec.poll(wait_s if plan.step_kind is StepKind.IDLE else 0.0)
        return ModelRunnerOutput(
            request_ids=tuple(each for part in made for each in part.request_ids),
            frames=np.concatenate([part.frames for part in made]) if made else None,
            finish=np.concatenate([part.status for part in made]) if made else None,
            errors=errors,
            chunks=tuple(results.chunks),
            clips=tuple(results.clips),
        )

    def warm_up(self) -> None:
        """Do whatever must not happen in the first steps."""
        with torch.inference_mode():
            if self._has_mirrors:
                self._prefiller.warm_up()
            self._decoder.warm_up()

    def has_codec_work(self) -> bool:
        """Whether audio or an encoded clip will come without another step."""
        return self._codec.has_work()

    def check_integrity(self) -> None:
        """Every row has one owner, and the batch agrees."""
        self._batch.check_integrity()
        owned = {request_id: running.row for request_id, running in self._requests.items()}
        assert owned == dict(self._batch.rows), (owned, dict(self._batch.rows))

    # Rows come and go

    def _update_states(self, plan: SchedulerOutput) -> None:
        """Apply what changed since the last step, in the order that ``SchedulerOutput`` sets."""
        for request_id in plan.finished:
            self._drop(request_id)
        for request_id, block_ids in plan.swap_out.items():
            self._swap_out(request_id, block_ids)
        for request_id, block_ids in plan.swap_in.items():
            self._swap_in(request_id, block_ids)
        for data in plan.new:
            self._add(data)
        for request_id, block_ids in plan.new_blocks.items():
            if request_id in self._requests:
                self._block_table.append(self._requests[request_id].row, block_ids)
        if self._clears_blocks:
            self._clear_new_blocks(plan)

    def _clear_new_blocks(self, plan: SchedulerOutput) -> None:
        """Blocks that hold nothing yet; a new request's first ones may come from the cache."""
        num_cached = {
            data.request_id: data.num_cached_positions // self._block_size for data in plan.new
        }
        empty: list[int] = []
        for request_id, block_ids in plan.new_blocks.items():
            empty.extend(block_ids[num_cached.get(request_id, 0) :])
        if empty:
            clear_blocks(self._kv_caches, empty)

    def _add(self, data: NewRequestData) -> None:
        row = self._take_row(data)
        self._state.add_request(row, data)
        self._codec.open(
            data.request_id, max_silence_frames=data.max_silence_frames, listener=data.listener
        )
        running = _Running(data, row, self._state.make_framing())
        self._requests[data.request_id] = running
        self._num_positions[row] = data.num_cached_positions
        self._num_pending[row] = 0
        self._num_due[row] = self._frames_until_due(running)

    def _take_row(self, data: NewRequestData) -> int:
        self._decode_batch = None
        row = self._batch.add_request(data.request_id, data.sampling_params, data.seed)
        self._decoder.enter(row)
        return row

    def _release_row(self, request_id: str) -> _Running:
        self._decode_batch = None
        running = self._requests.pop(request_id)
        self._batch.remove_request(request_id)
        self._block_table.clear(running.row)
        return running

    def _drop(self, request_id: str) -> None:
        """Forget a request that was ended from outside."""
        self._codec.close(request_id)
        self._swapped.pop(request_id, None)
        if request_id in self._requests:
            self._release_row(request_id)

    def _swap_out(self, request_id: str, block_ids: Sequence[int]) -> None:
        if request_id not in self._requests:
            return  # it ended in a step whose frames the scheduler does not have yet
        row = self._requests[request_id].row
        ids = copy_to_device(np.array(block_ids, np.int64), self._device)
        self._swapped[request_id] = _Swapped(
            running=self._requests[request_id],
            pages=[cache.view(torch.uint8)[:, ids].to("cpu") for cache in self._kv_caches],
            state=self._state.save_row(row),
            num_positions=int(self._num_positions[row]),
            pending=self._pending[row, : self._num_pending[row]].copy(),
        )
        self._release_row(request_id)

    def _swap_in(self, request_id: str, block_ids: Sequence[int]) -> None:
        swapped = self._swapped.pop(request_id)
        running = swapped.running
        row = running.row = self._take_row(running.data)
        self._requests[request_id] = running
        self._state.restore_row(row, swapped.state)
        self._block_table.append(row, block_ids)
        ids = copy_to_device(np.array(block_ids, np.int64), self._device)
        for cache, pages in zip(self._kv_caches, swapped.pages, strict=True):
            cache.view(torch.uint8)[:, ids] = pages.to(self._device)
        self._num_positions[row] = swapped.num_positions
        self._num_pending[row] = len(swapped.pending)
        self._pending[row, : len(swapped.pending)] = swapped.pending
        self._num_due[row] = self._frames_until_due(running)

    # Prefill: prompt positions into the cache, nothing sampled

    def _prefill(self, plan: SchedulerOutput) -> None:
        slices = []
        for chunk in plan.prefill:
            running, stop = self._requests[chunk.request_id], chunk.start + chunk.length
            slices.append(PromptSlice(running.data, running.row, chunk.start, stop))
        self._prefiller.run(slices)
        for part in slices:
            self._num_positions[part.row] = part.stop

    # Decode: one frame per request

    def _launch(self, request_ids: tuple[str, ...]) -> None:
        batch = self._prepare_decode(request_ids)
        if batch.owners:
            self._in_flight.append((batch, self._decoder.launch(batch.rows)))
            self._num_positions[batch.rows] += 1

    def _prepare_decode(self, request_ids: tuple[str, ...]) -> _DecodeBatch:
        """Rows, kept from the last step while nothing changed."""
        batch = self._decode_batch
        if batch is None or batch.planned != request_ids:
            # Without those that the scheduler does not know to have ended.
            known = (self._requests.get(request_id) for request_id in request_ids)
            owners = tuple(running for running in known if running is not None)
            batch = self._decode_batch = _DecodeBatch.of(request_ids, owners)
        return batch

    def _take_frames(self, num_kept: int) -> list[_Frames]:
        """Frames of the oldest steps, until no more than ``num_kept`` are under way."""
        made = []
        while len(self._in_flight) > num_kept:
            batch, get_frames = self._in_flight.popleft()
            frames, status = get_frames()
            if batch is not self._decode_batch:  # rows may have changed hands since
                owns = [self._requests.get(r.data.request_id) is r for r in batch.owners]
                batch = _DecodeBatch.of(batch.planned, tuple(compress(batch.owners, owns)))
                frames, status = frames[owns], status[owns]
            made.append(self._collect(batch, frames, status))
        return made

    # Frames to the codec, a window's worth at a time

    def _collect(
        self, batch: _DecodeBatch, frames: NDArray[np.int16], status: NDArray[np.uint8]
    ) -> _Frames:
        """Keep the new frames, and pass on those of rows that have ended or have a window due."""
        rows = batch.rows
        num_pending = self._num_pending[rows]
        self._pending[rows, num_pending] = frames
        num_pending += 1
        self._num_pending[rows] = num_pending
        due = (status != FrameStatus.RUNNING) | (num_pending >= self._num_due[rows])
        for index in np.flatnonzero(due).tolist():
            self._push(batch.owners[index], int(status[index]))
        return _Frames(batch.request_ids, frames, status)

    def _push(self, running: _Running, status: int) -> None:
        row = running.row
        new = self._pending[row, : self._num_pending[row]]
        is_last = status != FrameStatus.RUNNING
        codes = running.framing.push(new, ended=status == FrameStatus.STOPPED)
        self._codec.push(running.data.request_id, codes, final=is_last)
        if is_last:
            self._release_row(running.data.request_id)
            return
        self._num_pending[row] = 0
        self._num_due[row] = self._frames_until_due(running)

    def _frames_until_due(self, running: _Running) -> int:
        """Further frames after which the codec can decode another window."""
        num_frames = running.framing.num_frames
        missing = self._codec.next_due(num_frames) - num_frames
        is_first = num_frames == 0
        lag = self._state.num_codebooks - 1 if is_first else 0
        return min(missing + lag, _PENDING_FRAMES)
