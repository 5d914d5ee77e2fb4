"""Steps that are recorded once and replayed: which sizes there are, and who records them.

A step is a function of its size alone; what it computes on lies in tensors that stay where they
are. Knows neither what a step computes nor for whom.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

from vllm.logger import get_logger

__all__ = [
    "CudaGraphs",
    "DecodeSizes",
    "GraphBackend",
    "NoGraphs",
    "StepGraphs",
    "StepSize",
    "batch_buckets",
    "context_tiers",
]

logger = get_logger(__name__)

# Close enough that padding costs little where weights are read once for all rows anyway.
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224)
_BUCKET_STEP = 32  # beyond these
_TIERS = (1024, 2048, 8192, 32768)  # positions


class StepSize(NamedTuple):
    """What a recorded decode step is made for."""

    num_rows: int
    context_len: int


def batch_buckets(max_num_rows: int) -> tuple[int, ...]:
    """Numbers of rows that steps are recorded for; the last is ``max_num_rows``."""
    more = range(_BUCKETS[-1] + _BUCKET_STEP, max_num_rows, _BUCKET_STEP)
    return (*(size for size in (*_BUCKETS, *more) if size < max_num_rows), max_num_rows)


def context_tiers(max_context_len: int) -> tuple[int, ...]:
    """Context lengths that steps are recorded for; the last is ``max_context_len``."""
    return (*(tier for tier in _TIERS if tier < max_context_len), max_context_len)


class DecodeSizes:
    """Sizes of decode steps: each number of rows with each context length.

    Args:
        max_num_rows: of a step.
        max_context_len: of a row.
    """

    def __init__(self, max_num_rows: int, max_context_len: int) -> None:
        self._buckets = batch_buckets(max_num_rows)
        self._tiers = context_tiers(max_context_len)

    @property
    def all(self) -> list[StepSize]:
        """The largest first."""
        return [StepSize(b, t) for b in reversed(self._buckets) for t in reversed(self._tiers)]

    def size_for(self, num_rows: int, context_len: int) -> StepSize:
        """The smallest size that holds so many rows and positions."""
        bucket = self._buckets[bisect_left(self._buckets, num_rows)]
        return StepSize(bucket, self._tiers[bisect_left(self._tiers, context_len)])


class GraphBackend(Protocol):
    """How a function without arguments becomes one that is cheap to call again and again."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Let everything happen that only happens the first time."""
        ...

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does the same as ``run`` on the same memory."""
        ...


class NoGraphs:
    """Calls the function as it is: ``--enforce-eager``, and the same steps on a CPU."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Nothing: a first call is as good as any."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        return run


class CudaGraphs:
    """Records CUDA graphs that share one pool of memory.

    They may share it because none runs beside another and nothing in the pool is read after its
    own graph. Recording must come after everything that is built on first use, hence ``warm_up``,
    and before other threads use the device.

    They are recorded on a stream of their own, because torch keeps cuBLAS's workspace by the stream:
    graphs that run beside these, those of the codec, would otherwise be given the same.

    Args:
        device: where they run.
        is_urgent: their kernels go before those of graphs that are not.
    """

    def __init__(self, device: torch.device, *, is_urgent: bool = False) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Kernels of a graph have the priority of the stream that they were recorded on.
        priority = -1 if is_urgent else 0
        self._stream = torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]

    def warm_up(self, run: Callable[[], None]) -> None:
        run()
        torch.cuda.synchronize(self._device)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            run()
        replay: Callable[[], None] = graph.replay
        return replay


Size = TypeVar("Size", bound=Hashable)


class StepGraphs(Generic[Size]):
    """One recorded step per size.

    Args:
        run: takes a step of a size.
        backend: records it.
        sizes: all there are, the largest first, so that the smaller ones find room in its memory.
    """

    def __init__(
        self, run: Callable[[Size], None], backend: GraphBackend, sizes: Sequence[Size]
    ) -> None:
        self._run = run
        self._backend = backend
        self._sizes = sizes
        self._replays: dict[Size, Callable[[], None]] = {}

    def record(self) -> None:
        """Record every size, once all of them have run."""
        steps = {size: self._step(size) for size in self._sizes}
        for step in steps.values():
            self._backend.warm_up(step)
        gc.collect()
        for size, step in steps.items():
            self._replays[size] = self._backend.record(step)

    def replay(self, size: Size) -> None:
        """Launch the step of this size."""
        self._replays[size]()

    def _step(self, size: Size) -> Callable[[], None]:
        return lambda: self._run(size)
