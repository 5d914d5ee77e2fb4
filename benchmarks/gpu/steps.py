"""Decode and prefill steps of the engine's own runner, over rows that are filled by hand.

The runner is given plans as a scheduler would make them; contexts are as if a prompt of that
length had been in the cache, with random keys and values in the pages.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.clock import synchronize
from benchmarks.gpu.suite import Suite
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched_output import (
    NewRequestData,
    PrefillChunk,
    SchedulerOutput,
    StepKind,
)

__all__ = ["Rows", "fill_pages"]


def fill_pages(runner: Any) -> None:
    """Random keys and values everywhere, of the size that a model's are."""
    for cache in runner._kv_caches:
        if cache.dtype.itemsize == 1:
            cache.view(torch.uint8).random_(0, 0x3A)  # float8_e4m3 from 0 to 1.25
        else:
            cache.normal_()


class Rows:
    """Requests that a runner decodes or prefills, all alike.

    Args:
        suite: of what.
        runner: of an engine that has nothing else to do.
        num_blocks: pages that there are.
        num_shared: first positions whose pages all rows have in common.
    """

    NUM_WARM_STEPS = 8

    def __init__(self, suite: Suite, runner: Any, num_blocks: int, *, num_shared: int = 0) -> None:
        self._suite = suite
        self._runner = runner
        self._block_size: int = runner._block_size
        self._shared = tuple(range(num_shared // self._block_size))
        self._next_block = len(self._shared)
        self._num_blocks = num_blocks
        self._ids: list[str] = []

    def open(self, count: int, num_cached: int, num_new: int, *, num_audio: int = 0) -> None:
        """Requests with ``num_cached`` positions in the cache and room for ``num_new`` further.

        ``num_audio`` of the new ones are frames of a voice, in the middle.
        """
        new, blocks = [], {}
        for index in range(len(self._ids), len(self._ids) + count):
            request_id = f"row-{index}"
            data = self._data(request_id, index, num_cached, num_new, num_audio)
            new.append(data)
            blocks[request_id] = self._take_blocks(num_cached + num_new)
            self._ids.append(request_id)
        plan = SchedulerOutput(StepKind.IDLE, new=tuple(new), new_blocks=blocks)
        self._runner.execute_model(plan)

    def decode(self, num_steps: int) -> float:
        """Seconds of one step, the average of so many on the wall."""
        plan = SchedulerOutput(StepKind.DECODE, decode=tuple(self._ids))
        for _ in range(self.NUM_WARM_STEPS):
            self._execute(plan)
        synchronize(self._suite.device)
        start = time.perf_counter()
        for _ in range(num_steps):
            self._execute(plan)
        synchronize(self._suite.device)
        return (time.perf_counter() - start) / num_steps

    def prefill(self, num_cached: int, num_new: int) -> float:
        """Seconds of one step that puts the new positions of all requests into the cache."""
        chunks = tuple(PrefillChunk(each, num_cached, num_new, is_last=True) for each in self._ids)
        synchronize(self._suite.device)
        start = time.perf_counter()
        self._execute(SchedulerOutput(StepKind.PREFILL, prefill=chunks))
        synchronize(self._suite.device)
        return time.perf_counter() - start

    def close(self) -> None:
        """Give everything back."""
        finished = frozenset(self._ids)
        self._runner.execute_model(SchedulerOutput(StepKind.IDLE, finished=finished))
        self._ids.clear()
        self._next_block = len(self._shared)

    def _execute(self, plan: SchedulerOutput) -> None:
        output = self._runner.execute_model(plan)
        if output.errors:
            raise RuntimeError(next(iter(output.errors.values())))

    def _take_blocks(self, num_positions: int) -> tuple[int, ...]:
        count = -(-num_positions // self._block_size)
        own = range(self._next_block, self._next_block + max(count - len(self._shared), 0))
        if own.stop > self._num_blocks:
            raise MemoryError(f"{own.stop} pages are more than the {self._num_blocks} that fit")
        self._next_block = own.stop
        return (*self._shared[:count], *own)

    def _data(
        self, request_id: str, seed: int, num_cached: int, num_new: int, num_audio: int
    ) -> NewRequestData:
        config = self._suite.config
        first = num_cached + (num_new - num_audio) // 2
        frames = np.random.default_rng(seed).integers(
            0, config.stream_bos_id, (num_audio, config.num_codebooks)
        )
        return NewRequestData(
            request_id=request_id,
            prompt_token_ids=np.full(num_cached + num_new, 100, np.int32),
            prompt_frames=frames.astype(np.int16),
            audio_positions=np.arange(first, first + num_audio),
            sampling_params=SamplingParams(),
            seed=seed,
            frame_limit=1 << 20,
            max_silence_frames=None,
            num_cached_positions=num_cached,
        )
