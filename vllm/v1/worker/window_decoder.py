"""Batches of codec windows to samples on one device, recorded where graphs are.

Knows codecs and windows; knows neither requests nor whose turn it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm.model_executor.codecs.streaming import Window, WindowShape
from vllm.platforms import copy_to_device
from vllm.v1.worker.cuda_graphs import GraphBackend

if TYPE_CHECKING:
    from vllm.model_executor.codecs.interface import Codec

__all__ = ["WindowDecoder", "recorded_sizes"]


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A decode of so many windows of one shape."""

    codes: Tensor  # int64 [batch, num_codebooks, num_frames]
    samples: Tensor  # float32 [batch, (last - first) * hop], in memory that all of them share
    replay: Callable[[], None]


class WindowDecoder:
    """Runs windows of one shape through the codec, on its own stream where there are streams.

    Args:
        codec: with its weights on ``device``.
        device: where the work is done.
    """

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self._codec = codec
        self._device = device
        self._recorded: dict[tuple[int, WindowShape], _Recorded] = {}  # by batch too
        self._shapes: list[WindowShape] = []  # recorded, those that emit least first
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def record(
        self, graphs: GraphBackend, shapes: Iterable[WindowShape], *, max_batch: int
    ) -> None:
        """Record windows of these shapes; what fits none of them is launched as it is."""
        self._shapes = sorted(shapes, key=_num_computed)
        sizes = recorded_sizes(self._shapes, max_batch)
        # Nothing of one batch is read after the next one began.
        num_samples = [
            batch * _num_computed(shape) * self._codec.hop_length for batch, shape in sizes
        ]
        memory = torch.zeros(max(num_samples), device=self._device)
        for (batch, shape), size in zip(sizes, num_samples, strict=True):
            num_codebooks = self._codec.num_codebooks
            codes = torch.zeros(
                *(batch, num_codebooks, shape.num_frames), dtype=torch.int64, device=self._device
            )
            samples = memory[:size].view(batch, -1)

            def run(
                codes: Tensor = codes, samples: Tensor = samples, shape: WindowShape = shape
            ) -> None:
                samples.copy_(self._codec.decode_part(codes, shape.first, shape.last))

            graphs.warm_up(run)
            self._recorded[batch, shape] = _Recorded(codes, samples, graphs.record(run))

    def shape_of(self, window: Window) -> WindowShape:
        """What is decoded for this window: a recorded shape that holds it, or else its own."""
        own = window.shape
        return next((shape for shape in self._shapes if shape.holds(own)), own)

    @torch.inference_mode()
    def decode(self, inputs: list[tuple[NDArray[np.int16], Window]]) -> list[NDArray[np.float32]]:
        """Codes [K, n] with their windows, equal in ``shape_of``, to the samples that each emits."""
        (shape,) = {self.shape_of(window) for _, window in inputs}
        codes = np.stack([frames for frames, _ in inputs]).astype(np.int64)
        with self.on_stream():
            samples = _to_host(self._samples(codes, shape))
        hop, origins = self._codec.hop_length, [window.start + shape.first for _, window in inputs]
        return [
            row[(window.emit_start - origin) * hop : (window.emit_stop - origin) * hop]
            for row, origin, (_, window) in zip(samples, origins, inputs, strict=True)
        ]

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Where streams are, work of this thread goes to that of the windows meanwhile."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def _samples(self, codes: NDArray[np.int64], shape: WindowShape) -> Tensor:
        """Samples of the frames that are computed, float32 [batch, (last - first) * hop]."""
        on_device = copy_to_device(codes, self._device)
        batch = len(codes)
        size = min((b for b, each in self._recorded if each == shape and b >= batch), default=None)
        if size is None:
            return self._codec.decode_part(on_device, shape.first, shape.last)
        recorded = self._recorded[size, shape]
        recorded.codes[:batch].copy_(on_device)
        recorded.replay()
        samples = recorded.samples[:batch]
        return samples if samples.is_cuda else samples.clone()  # the next batch writes it again


def recorded_sizes(shapes: Iterable[WindowShape], max_batch: int) -> list[tuple[int, WindowShape]]:
    """Numbers of windows with each shape, those that take most memory first.

    Numbers are the powers of two below ``max_batch``, and itself.
    """
    batches = [*(1 << n for n in range((max_batch - 1).bit_length())), max_batch]
    sizes = [(batch, shape) for batch in batches for shape in shapes]
    return sorted(sizes, key=lambda size: (size[0], _num_computed(size[1])), reverse=True)


def _num_computed(shape: WindowShape) -> int:
    return shape.last - shape.first


def _to_host(samples: Tensor) -> NDArray[np.float32]:
    """Waits for what was launched on this stream, and for nothing else."""
    host = samples
    if samples.is_cuda:
        host = torch.empty(samples.shape, dtype=samples.dtype, pin_memory=True)
        host.copy_(samples, non_blocking=True)
        torch.cuda.current_stream(samples.device).synchronize()
    values: NDArray[np.float32] = host.numpy()
    return values
