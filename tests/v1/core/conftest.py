"""Builders for scheduler tests, and a worker that keeps tags instead of keys and values."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import numpy as np
import pytest

from vllm.config import SchedulerConfig
from vllm.outputs import FinishReason
from vllm.player import Listener
from vllm.sampling_params import SamplingParams
from vllm.v1.core import NewRequestData, Scheduler, SchedulerOutput, StepKind
from vllm.v1.engine.messages import EngineCoreOutput, EngineCoreRequest
from vllm.v1.outputs import AudioChunk, ModelRunnerOutput
from vllm.v1.request import Request

K = 4
BOS, EOS = 1024, 1025
AUDIO_ID = 7
HOP = 2
FRAME_S = 0.04


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def build_request(
    request_id: str,
    num_prompt: int = 20,
    *,
    frame_limit: int = 1000,
    token_seed: int | None = None,
    num_audio: int = 0,
    code_offset: int = 0,
    num_pinned: int = 0,
    priority: int = 0,
    arrival_time: float = 0.0,
    listener: Listener | None = None,
) -> Request:
    """Request with a prompt of its own, or one that depends on ``token_seed`` only."""
    seed = zlib.crc32(request_id.encode()) if token_seed is None else token_seed
    token_ids = np.random.default_rng(seed).integers(100, 1000, num_prompt).astype(np.int32)
    audio_positions = np.arange(1, 1 + num_audio)
    token_ids[audio_positions] = AUDIO_ID
    frames = np.arange(num_audio * K).reshape(num_audio, K) + code_offset
    core_request = EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=token_ids.tobytes(),
        sampling_params=SamplingParams(),
        seed=zlib.crc32(request_id.encode()) % 1000,
        frame_limit=frame_limit,
        limit_reason=FinishReason.MAX_AUDIO,
        num_pinned_positions=num_pinned,
        priority=priority,
        arrival_time=arrival_time,
        listener=listener,
    )
    return Request.from_core(core_request, frames.astype(np.int16), audio_positions)


def real_code(seed: int, frame: int, codebook: int) -> int:
    """Code of real frame ``frame`` (from 0)."""
    return (seed * 31 + frame * 7 + codebook * 3) % BOS


def delayed_frame(seed: int, index: int, num_real: int) -> list[int]:
    """Delayed frame ``index`` of an utterance of ``num_real`` frames: BOS, codes, EOS."""
    codes = []
    for codebook in range(K):
        frame = index - codebook - 1
        if frame < 0:
            codes.append(BOS)
        else:
            codes.append(real_code(seed, frame, codebook) if frame < num_real else EOS)
    return codes


class _Row:
    """What the worker holds of one request, on the device or on the host."""

    def __init__(self, data: NewRequestData) -> None:
        self.data = data
        self.table: list[int] = []
        self.num_prefilled = 0
        self.frames: list[list[int]] = []
        self.host_pages: np.ndarray | None = None  # [num_blocks, block_size] while swapped

    @property
    def num_prompt(self) -> int:
        return len(self.data.prompt_token_ids)

    def tag(self, position: int) -> int:
        """What a correct cache holds at ``position``: prompt content, or owner and position."""
        if position < self.num_prompt:
            head = self.data.prompt_token_ids[: position + 1].tobytes()
            return zlib.crc32(head + self.data.prompt_frames.tobytes()) + 1
        return zlib.crc32(f"{self.data.request_id}/{position}".encode()) + 1


class FakeWorker:
    """Executes plans on pages of tags; fails when a step reads what is not its own history."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int) -> None:
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.pages = np.zeros((num_blocks, block_size), np.int64)
        self.rows: dict[str, _Row] = {}  # device rows
        self.host: dict[str, _Row] = {}  # swapped out
        self.codec: dict[str, tuple[_Row, int]] = {}  # frames all made; real frames sent so far
        self.num_sent: dict[str, int] = {}
        self.ends: dict[str, int] = {}  # req_id -> real frames until EOS
        self.cuts: dict[str, int] = {}  # req_id -> real frames that the silence guard keeps
        self.failing: dict[str, str] = {}  # req_id -> error of its next step
        self.holds_audio: Callable[[], bool] = lambda: False  # codec is busy

    @property
    def num_held(self) -> int:
        """Requests that the worker still keeps something of."""
        return len(self.rows) + len(self.host) + len(self.codec)

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        self._move(plan)
        errors: dict[str, str] = {}
        for chunk in plan.prefill:
            if chunk.request_id in self.failing:
                errors[chunk.request_id] = self.failing.pop(chunk.request_id)
                continue
            self._prefill(chunk.request_id, chunk.start, chunk.length)
            row = self.rows[chunk.request_id]
            assert chunk.is_last == (row.num_prefilled == row.num_prompt)
        made, frames, finish = [], [], []
        assert (plan.step_kind is StepKind.DECODE) == bool(plan.decode)
        assert (plan.step_kind is StepKind.PREFILL) == bool(plan.prefill)
        for request_id in plan.decode:
            if request_id in self.failing:
                errors[request_id] = self.failing.pop(request_id)
                continue
            frame, flag = self._decode(request_id)
            made.append(request_id)
            frames.append(frame)
            finish.append(flag)
        return ModelRunnerOutput(
            request_ids=tuple(made),
            frames=np.array(frames, np.int16) if frames else None,
            finish=np.array(finish, np.uint8) if frames else None,
            errors=errors,
            chunks=tuple(self._collect_audio()),
        )

    def _move(self, plan: SchedulerOutput) -> None:
        for request_id in plan.finished:
            held = [d.pop(request_id, None) for d in (self.rows, self.host, self.codec)]
            self.num_sent.pop(request_id, None)
            assert any(h is not None for h in held), f"{request_id} was not known"
        for request_id, blocks in plan.swap_out.items():
            row = self.rows.pop(request_id)
            assert list(blocks) == row.table[: len(blocks)]
            row.host_pages = self.pages[list(blocks)].copy()
            row.table = []
            self.host[request_id] = row
        for request_id, blocks in plan.swap_in.items():
            row = self.host.pop(request_id)
            assert row.host_pages is not None
            assert len(blocks) == len(row.host_pages)
            self.pages[list(blocks)] = row.host_pages
            row.host_pages, row.table = None, list(blocks)
            self.rows[request_id] = row
        for data in plan.new:
            assert data.request_id not in self.rows
            self.rows[data.request_id] = _Row(data)
        for request_id, blocks in plan.new_blocks.items():
            self.rows[request_id].table += blocks
        assert len(self.rows) <= self.max_num_seqs

    def _slot(self, row: _Row, position: int) -> tuple[int, int]:
        return row.table[position // self.block_size], position % self.block_size

    def _check_history(self, row: _Row, length: int) -> None:
        read = [int(self.pages[self._slot(row, p)]) for p in range(length)]
        assert read == [row.tag(p) for p in range(length)], row.data.request_id

    def _prefill(self, request_id: str, start: int, length: int) -> None:
        row = self.rows[request_id]
        self._check_history(row, start)
        for position in range(start, start + length):
            self.pages[self._slot(row, position)] = row.tag(position)
        row.num_prefilled = start + length

    def _decode(self, request_id: str) -> tuple[list[int], int]:
        row = self.rows[request_id]
        seed, num_real = row.data.seed, self.ends.get(request_id, 10**6)
        if not row.frames:
            row.frames.append([BOS] * K)
        position = row.num_prompt + len(row.frames) - 1
        self._check_history(row, position)
        self.pages[self._slot(row, position)] = row.tag(position)
        row.frames.append(delayed_frame(seed, len(row.frames), num_real))
        if row.frames[-1] == [EOS] * K:
            flag = 1
        else:
            flag = 2 if len(row.frames) == row.data.frame_limit else 0
        if flag:
            num_frames = len(row.frames)
            num_real = num_frames - K - 1 if flag == 1 else max(num_frames - K, 0)
            self.codec[request_id] = (self.rows.pop(request_id), num_real)
        return row.frames[-1], flag

    def _collect_audio(self) -> list[AudioChunk]:
        chunks = []
        live = {**self.rows, **self.host, **{i: row for i, (row, _) in self.codec.items()}}
        for request_id, row in live.items():
            if self.holds_audio():
                continue
            is_done = request_id in self.codec
            ready = self.codec[request_id][1] if is_done else max(len(row.frames) - K, 0)
            cut = self.cuts.get(request_id)
            is_cut = cut is not None and ready >= cut
            stop = min(ready, cut) if cut is not None else ready
            sent = self.num_sent.get(request_id, 0)
            final = is_done or is_cut
            if stop - sent < 3 and not final:
                continue
            samples = np.arange(sent * HOP, stop * HOP, dtype=np.float32)
            chunks.append(
                AudioChunk(request_id, samples, stop - sent, final, cut if is_cut else None)
            )
            self.num_sent[request_id] = stop
            if is_done:
                del self.codec[request_id], self.num_sent[request_id]
            elif is_cut:
                self.cuts[request_id] = 10**6  # the scheduler ends the request next
        return chunks


class Bench:
    """Scheduler and worker together, with everything that came out."""

    def __init__(self, scheduler: Scheduler, worker: FakeWorker, clock: Clock) -> None:
        self.scheduler = scheduler
        self.worker = worker
        self.clock = clock
        self.outputs: dict[str, list[EngineCoreOutput]] = {}
        self.step_s: Callable[[SchedulerOutput], float] = lambda plan: 0.0  # while it is executed

    def step(self) -> SchedulerOutput:
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        self.finish(plan)
        return plan

    def finish(self, plan: SchedulerOutput) -> None:
        self.clock.now += self.step_s(plan)
        for output in self.scheduler.update_from_output(plan, self.worker.execute(plan)):
            self.outputs.setdefault(output.request_id, []).append(output)
        self.scheduler.check_integrity()
        self.clock.now += 0.001

    def run_until_idle(self, max_steps: int = 5000) -> list[SchedulerOutput]:
        plans = []
        while self.scheduler.has_unfinished():
            plans.append(self.step())
            assert len(plans) < max_steps, "no progress"
        return plans

    def reason(self, request_id: str) -> FinishReason | None:
        """The finish reason, after checking that there is one at most and that it came last."""
        reasons = [output.finish_reason for output in self.outputs.get(request_id, [])]
        assert all(reason is None for reason in reasons[:-1]), (request_id, reasons)
        return reasons[-1] if reasons else None

    def codes(self, request_id: str) -> np.ndarray:
        """[K, num_frames], all increments joined."""
        parts = [np.frombuffer(o.codes, np.int16).reshape(K, -1) for o in self.outputs[request_id]]
        return np.concatenate(parts, axis=1)

    def delayed_codes(self, request_id: str) -> np.ndarray:
        """[num_steps, K], all increments joined."""
        joined = b"".join(output.delayed_codes for output in self.outputs[request_id])
        return np.frombuffer(joined, np.int16).reshape(-1, K)

    def num_samples(self, request_id: str) -> int:
        return sum(len(output.audio) for output in self.outputs[request_id]) // 4


@pytest.fixture
def make_request() -> Callable[..., Request]:
    return build_request


@pytest.fixture
def make_bench() -> Callable[..., Bench]:
    def build(
        *,
        num_blocks: int = 64,
        block_size: int = 8,
        max_num_seqs: int = 8,
        max_model_len: int = 4096,
        enable_prefix_caching: bool = True,
        **config: float,
    ) -> Bench:
        clock = Clock()
        scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=max_num_seqs, **config),
            block_size,
            num_blocks,
            max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            bos_code=BOS,
            frame_s=FRAME_S,
            clock=clock,
        )
        return Bench(scheduler, FakeWorker(num_blocks, block_size, max_num_seqs), clock)

    return build


@pytest.fixture
def rng() -> random.Random:
    return random.Random(1234)


@pytest.fixture
def expected_codes() -> Callable[[str, int], np.ndarray]:
    """Real codes [K, num_frames] that the fake worker makes for a request."""

    def build(request_id: str, num_frames: int) -> np.ndarray:
        seed = zlib.crc32(request_id.encode()) % 1000
        codes = [[real_code(seed, u, k) for u in range(num_frames)] for k in range(K)]
        return np.array(codes, np.int16).reshape(K, num_frames)

    return build
