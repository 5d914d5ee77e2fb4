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

from vllm.model_executor.codecs.streaming import Window
from vllm.platforms import copy_to_device
from vllm.v1.worker.cuda_graphs import GraphBackend

if TYPE_CHECKING:
    from vllm.model_executor.codecs.interface import Codec

__all__ = ["WindowDecoder"]


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A decode of so many windows of one length, in memory of its own."""

    codes: Tensor  # int64 [batch, num_codebooks, num_frames]
    samples: Tensor  # float32 [batch, num_frames * hop]
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
        self._recorded: dict[tuple[int, int], _Recorded] = {}  # batch, frames
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def record(self, graphs: GraphBackend, lengths: Iterable[int], *, max_batch: int) -> None:
        """Record windows of these lengths; others, at the end of a stream, stay as they are."""
        sizes = [(batch, length) for batch in _batches(max_batch) for length in lengths]
        for batch, num_frames in sorted(sizes, reverse=True):
            codec = self._codec
            shape = (batch, codec.num_codebooks, num_frames)
            codes = torch.zeros(shape, dtype=torch.int64, device=self._device)
            samples = torch.zeros(batch, num_frames * codec.hop_length, device=self._device)

            def run(codes: Tensor = codes, samples: Tensor = samples) -> None:
                samples.copy_(self._codec.decode(codes))

            graphs.warm_up(run)
            self._recorded[batch, num_frames] = _Recorded(codes, samples, graphs.record(run))

    @torch.inference_mode()
    def decode(self, inputs: list[tuple[NDArray[np.int16], Window]]) -> list[NDArray[np.float32]]:
        """Codes [K, n] with their windows (equal n) to the samples that each window emits."""
        # Windows of a batch may begin and end differently in what they emit.
        first = min(window.emit_start - window.start for _, window in inputs)
        last = max(window.emit_stop - window.start for _, window in inputs)
        codes = np.stack([frames for frames, _ in inputs]).astype(np.int64)
        with self.on_stream():
            samples = _to_host(self._samples(codes, first, last))
        hop, origins = self._codec.hop_length, [window.start + first for _, window in inputs]
        return [
            row[(window.emit_start - origin) * hop : (window.emit_stop - origin) * hop]
            for row, origin, (_, window) in zip(samples, origins, inputs, strict=True)
        ]

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Where streams are, work of this thread goes to that of the windows meanwhile."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def _samples(self, codes: NDArray[np.int64], first: int, last: int) -> Tensor:
        """Samples of frames ``first .. last - 1``, float32 [batch, (last - first) * hop]."""
        batch, _, num_frames = codes.shape
        on_device = copy_to_device(codes, self._device)
        size = min((b for b, n in self._recorded if n == num_frames and b >= batch), default=None)
        if size is None:
            return self._codec.decode_part(on_device, first, last)
        recorded = self._recorded[size, num_frames]
        recorded.codes[:batch].copy_(on_device)
        recorded.replay()
        hop = self._codec.hop_length
        part = recorded.samples[:batch, first * hop : last * hop]
        return part if part.is_cuda else part.clone()  # the next batch writes it again


def _batches(max_batch: int) -> list[int]:
    """Powers of two below ``max_batch``, and itself."""
    return [*(1 << n for n in range((max_batch - 1).bit_length())), max_batch]


def _to_host(samples: Tensor) -> NDArray[np.float32]:
    """Waits for what was launched on this stream, and for nothing else."""
    host = samples
    if samples.is_cuda:
        host = torch.empty(samples.shape, dtype=samples.dtype, pin_memory=True)
        host.copy_(samples, non_blocking=True)
        torch.cuda.current_stream(samples.device).synchronize()
    values: NDArray[np.float32] = host.numpy()
    return values
