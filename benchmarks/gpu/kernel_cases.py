"""Kernels behind their faces, over the shapes of the model: what they do, and what torch does.

Sections ``correctness`` and ``micro`` take the same cases. Inputs are random and fresh for each;
several copies of the large operands keep caches cold when calls are timed one after another.
Products are in ``linear_cases``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import floors
from benchmarks.gpu.floors import Work
from benchmarks.gpu.suite import Suite
from vllm.kernels.decode_attention import rope_write_attend
from vllm.kernels.reference import apply_rope
from vllm.kernels.sampler import DeviceSampler
from vllm.model_executor.framing import DelayPattern
from vllm.model_executor.heads import CodebookState
from vllm.sampling_params import SamplingParams
from vllm.v1.sample import RowSettings, Sampler, SamplingMetadata

__all__ = ["COLD_BYTES", "LIMITS", "Case", "SamplerRows", "attention_case"]

COLD_BYTES = 256 << 20  # more than any card's cache
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}
_BLOCK_SIZE = 16


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    ``ours`` and ``torch`` hold one call per copy of the operands, to be timed; what they leave in
    memory may add up.
    """

    kernel: str
    shape: str
    ours: tuple[Callable[[], Tensor], ...]
    torch: tuple[Callable[[], Tensor], ...]  # the plain product or attention, without what we fuse
    num_rows: int
    first_rows: Callable[[int], Tensor]  # ours for the first rows alone, of the first copy
    exact: Callable[[], Tensor]  # float64, of all rows of the first copy
    work: Work
    limit: float  # of ||ours - exact|| / ||exact||


def attention_case(suite: Suite, batch: int, context: int, *, is_cold: bool) -> Case:
    """One layer's attention of a decode step, over pages in random order."""
    config, dtype, device = suite.config, suite.scale.dtype, suite.device
    num_heads, num_kv, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    blocks_each = -(-context // _BLOCK_SIZE)
    shape = (2, batch * blocks_each, num_kv, _BLOCK_SIZE, dim)
    work = floors.attention(config, batch, context, itemsize=dtype.itemsize)
    copies = 1
    if is_cold and suite.is_cuda:
        copies = max(min(COLD_BYTES // int(work.kv_bytes), 16), 1)
    caches = [torch.randn(shape, device=device).to(dtype) for _ in range(copies)]
    order = torch.randperm(batch * blocks_each, device=device)
    tables = order.view(batch, blocks_each)
    rows = torch.arange(batch, device=device)
    # Of one length, or the floor would be that of another batch.
    positions = torch.full((batch,), context - 1, device=device)
    qkv = torch.randn(batch, (num_heads + 2 * num_kv) * dim, device=device).to(dtype)
    angles = torch.rand(context, 1, dim // 2, device=device) * (2 * math.pi)
    cos = torch.cat([angles.cos()] * 2, -1).to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    scale = dim**-0.5

    def run(cache: Tensor, part: Tensor) -> Tensor:
        where = (tables, rows[: len(part)], positions[: len(part)])
        return rope_write_attend(part, cos, sin, cache, *where, num_heads, scale)

    def exact() -> Tensor:
        heads = qkv.double().view(batch, -1, dim)
        rotated = apply_rope(heads[:, : num_heads + num_kv], cos.double()[-1:], sin.double()[-1:])
        pages = caches[0].double()[:, tables].transpose(3, 2).flatten(3, 4)
        keys, values = pages[:, :, :, :context].unbind()
        keys[:, :, -1] = rotated[:, num_heads:].to(dtype).double()
        values[:, :, -1] = heads[:, num_heads + num_kv :]
        query = rotated[:, :num_heads].unflatten(1, (num_kv, -1))
        weights = (query @ keys.transpose(2, 3) * scale).softmax(-1)
        return (weights @ values).flatten(1)

    dense = torch.randn(2, batch, num_kv, context, dim, device=device).to(dtype)
    own = qkv.clone()  # queries and keys may be rotated in place
    query = qkv[:, : num_heads * dim].view(batch, num_heads, 1, dim)
    return Case(
        kernel="attention",
        shape=f"B={batch} ctx={context}",
        ours=tuple(lambda cache=cache: run(cache, own) for cache in caches),
        torch=(
            lambda: F.scaled_dot_product_attention(
                query, dense[0], dense[1], scale=scale, enable_gqa=True
            ),
        ),
        exact=exact,
        num_rows=batch,
        first_rows=lambda count: run(caches[0], qkv[:count].clone()),
        work=work,
        limit=max(LIMITS[dtype], 5e-6),
    )


class SamplerRows:
    """Streams in the middle of an utterance, for the sampler on the device and for torch's."""

    def __init__(self, suite: Suite, num_rows: int, params: SamplingParams | None = None) -> None:
        config = suite.config
        self.size, self.device = config.codebook_size, suite.device
        self.num_codebooks, self.num_rows = config.num_codebooks, num_rows
        self._pattern = DelayPattern(
            config.num_codebooks, config.stream_bos_id, config.stream_eos_id
        )
        self._settings = RowSettings(num_rows)
        self._state, self._torch_state = (
            CodebookState(self._pattern, num_rows, suite.device) for _ in range(2)
        )
        self.rows = torch.arange(num_rows, device=suite.device)
        shape = (num_rows, config.num_codebooks, config.codebook_size)
        self.logits = torch.randn(shape, device=suite.device) * 3.0
        self.positions = torch.zeros(num_rows, dtype=torch.int64, device=suite.device)
        self.results = torch.zeros(
            num_rows, config.num_codebooks + 1, dtype=torch.int16, device=suite.device
        )
        for row in range(num_rows):
            self._settings.set_row(row, params or SamplingParams(), seed=row)
        self._start()
        self._sampler = DeviceSampler(self._state.memory, self.positions)
        self._sampler.start_rows(np.arange(num_rows), self._settings.memory)
        self._metadata = SamplingMetadata.of_rows(
            range(num_rows), self._settings, self.size, suite.device
        )

    def _start(self) -> None:
        past = torch.randint(
            self._pattern.bos, (self.num_codebooks + 2, self.num_rows, self.num_codebooks)
        )
        for state in (self._state, self._torch_state):
            for row in range(self.num_rows):
                state.add_row(row)
            state.start(self.rows)
            for frames in past:
                state.advance(self.rows, frames.to(self.device))

    def draw(self, count: int | None = None) -> Tensor:
        """One launch for the first rows, or all: frames, int16 [count, num_codebooks]."""
        results = self.results[:count]
        self._sampler(self.logits[:count], self.rows[:count], results)
        return results[:, :-1]

    def torch_draw(self) -> Tensor:
        """The same with torch: frames int64 [num_rows, num_codebooks]."""
        state, metadata = self._torch_state, self._metadata
        history = state.recent(self.rows, metadata.history_width)
        next_frame = state.next_frame(self.rows)
        sampler = Sampler(self._pattern)
        frames = sampler(self.logits.clone(), metadata, next_frame, history)
        state.advance(self.rows, frames)
        return frames

    def save(self) -> list[Tensor]:
        """A copy of the streams that the device's sampler moves on."""
        memory = self._state.memory
        return [each.clone() for each in (memory.counters, memory.history, memory.last_frame)]

    def restore(self, saved: list[Tensor]) -> None:
        memory = self._state.memory
        state = (memory.counters, memory.history, memory.last_frame)
        for each, copy in zip(state, saved, strict=True):
            each.copy_(copy)

    @property
    def work(self) -> Work:
        """The logits, read once."""
        return Work(self.logits.numel() * self.logits.element_size())
