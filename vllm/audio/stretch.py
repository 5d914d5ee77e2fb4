"""Change of speaking speed with the pitch kept, on a stream of samples.

One object serves one request from its first sample to its last; knows nothing of requests.
The stretching itself is libav's ``atempo`` filter (waveform similarity overlap-add).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vllm.audio.blocks import BlockBuffer
from vllm.exceptions import InvalidRequestError

if TYPE_CHECKING:
    from av.filter import Graph

__all__ = ["MAX_SPEED", "MIN_SPEED", "TimeStretch"]

MIN_SPEED = 0.25
MAX_SPEED = 4.0

_BLOCK_S = 0.02  # input goes to the filter in steps of this, so results do not depend on cuts
_TAIL_S = 0.2  # silence that pushes the last sound out of the filter's window


class TimeStretch:
    """Stateful stretch: n samples in, ``round(n / speed)`` out once finished.

    Args:
        sample_rate: in Hz.
        speed: ``MIN_SPEED`` to ``MAX_SPEED``; 2 halves the length. 1 passes samples unchanged.

    Raises:
        InvalidRequestError: speed out of range.
    """

    def __init__(self, sample_rate: int, speed: float) -> None:
        if not MIN_SPEED <= speed <= MAX_SPEED:
            raise InvalidRequestError(
                f"speed {speed} is out of range; use {MIN_SPEED} to {MAX_SPEED}", param="speed"
            )
        self._sample_rate = sample_rate
        self._speed = speed
        self._blocks = BlockBuffer(max(1, round(sample_rate * _BLOCK_S)))
        self._graph = None if speed == 1.0 else _atempo_graph(sample_rate, speed)
        self._num_in = 0
        self._num_filtered = 0  # samples given to the filter
        self._num_out = 0

    def process(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take samples [n]; return those [m] that are ready, m from 0."""
        if self._graph is None:
            return samples
        self._num_in += len(samples)
        return self._limit(
            [out for block in self._blocks.push(samples) for out in self._filter(block)]
        )

    def finish(self) -> NDArray[np.float32]:
        """The rest, so that the total length is exactly ``round(n / speed)``."""
        if self._graph is None:
            return np.zeros(0, np.float32)
        tail = np.zeros(round(self._sample_rate * _TAIL_S), np.float32)
        blocks = [*self._blocks.push(tail), self._blocks.flush()]
        outs = [out for block in blocks if len(block) for out in self._filter(block)]
        self._graph.push(None)
        return self._limit([*outs, *_pull_all(self._graph)])

    def _filter(self, block: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        from av import AudioFrame

        assert self._graph is not None
        frame = AudioFrame.from_ndarray(block[np.newaxis], format="flt", layout="mono")
        frame.sample_rate = self._sample_rate
        frame.pts = self._num_filtered
        self._num_filtered += len(block)
        self._graph.push(frame)
        return _pull_all(self._graph)

    def _limit(self, parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Join, and cut what belongs to the silent tail."""
        ready = np.concatenate([np.zeros(0, np.float32), *parts])
        ready = ready[: max(0, round(self._num_in / self._speed) - self._num_out)]
        self._num_out += len(ready)
        return ready


def _atempo_graph(sample_rate: int, speed: float) -> Graph:
    """Source, as many ``atempo`` filters as the range of one (0.5 to 2) asks for, and sink."""
    from av.filter import Graph

    graph = Graph()
    last = graph.add_abuffer(sample_rate=sample_rate, format="flt", layout="mono")
    for factor in _factors(speed):
        node = graph.add("atempo", repr(factor))
        last.link_to(node)
        last = node
    last.link_to(graph.add("abuffersink"))
    graph.configure()
    return graph


def _factors(speed: float) -> list[float]:
    """Factors in [0.5, 2] whose product is ``speed``; beyond 2, one filter would skip samples."""
    if 0.5 <= speed <= 2.0:
        return [speed]
    root = speed**0.5
    return [root, root]


def _pull_all(graph: Graph) -> list[NDArray[np.float32]]:
    from av.error import BlockingIOError, EOFError

    outs: list[NDArray[np.float32]] = []
    while True:
        try:
            outs.append(graph.pull().to_ndarray().reshape(-1).astype(np.float32))
        except (BlockingIOError, EOFError):
            return outs
