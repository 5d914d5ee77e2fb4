"""The seam between the runner and a model family: inputs of a step, and what follows from it.

A ``ModelState`` owns what a family keeps per row and binds its head and framing; the runner sees
embeddings, frames and a finish code. It knows neither requests' lifetimes nor the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm.kernels.decode_step import DecoderRows, DecodeStep, can_decode
from vllm.kernels.dependent_launch import DependentLaunch
from vllm.kernels.fused_step import FusedRows, FusedStep, can_fuse
from vllm.kernels.sampler import DeviceSampler, SamplingMemory
from vllm.model_executor.framing import DelayFraming, DelayPattern
from vllm.model_executor.heads import CodebookState
from vllm.model_executor.models.interface import SpeechModel
from vllm.v1.core.sched_output import NewRequestData
from vllm.v1.sample import FrameSampler, Sampler, SamplingMetadata, TorchDeviceSampler

__all__ = ["CodebookModelState", "ModelState", "NextContent"]


class NextContent(NamedTuple):
    """One new frame per row."""

    frames: Tensor  # int64 [num_rows, num_codebooks], delayed
    status: Tensor  # uint8 [num_rows]: 0 running, 1 ended by EOS, 2 frame limit


class ModelState(Protocol):
    """Per-row state of one model family."""

    @property
    def num_codebooks(self) -> int: ...

    def add_request(self, row: int, request: NewRequestData) -> None:
        """Start a request in ``row``; its first frame needs no model."""
        ...

    def save_row(self, row: int) -> Any:
        """Snapshot of a row, on the host, for ``restore_row``."""
        ...

    def restore_row(self, row: int, snapshot: Any) -> None:
        """Go on in ``row`` where the snapshot was taken."""
        ...

    def embed_prompt(self, ids: Tensor, frames: Tensor) -> Tensor:
        """Inputs of a prefill step.

        Args:
            ids: int64 [num_text].
            frames: int64 [num_audio, num_codebooks], delayed.

        Returns:
            [num_text + num_audio, hidden_size], text first.
        """
        ...

    def embed_last_content(self, rows: Tensor) -> Tensor:
        """Inputs of a decode step: [num_rows, hidden_size]."""
        ...

    def next_content(self, hidden: Tensor, rows: Tensor, metadata: SamplingMetadata) -> NextContent:
        """Sample each row's next frame from its hidden state and advance the row."""
        ...

    def native_step(
        self,
        kv_caches: Sequence[Tensor],
        block_tables: NDArray[np.int64],
        positions: NDArray[np.int64],
        sampling: SamplingMemory,
    ) -> DecodeStep | None:
        """What takes decode steps in one native call; None where torch has to take them.

        Args:
            kv_caches: one per layer.
            block_tables: of all rows, [max_num_rows, max_blocks].
            positions: [max_num_rows], where each row's last content goes.
            sampling: settings of all rows.
        """
        ...

    def fused_step(
        self,
        kv_caches: Sequence[Tensor],
        block_tables: Tensor,
        *,
        max_batch: int,
        batch_invariant: bool,
        pdl: DependentLaunch = DependentLaunch.OFF,
    ) -> FusedStep | None:
        """What computes logits in steps that a device takes, in few launches.

        None where ``SpeechModel.forward`` has to.

        Args:
            kv_caches: one per layer.
            block_tables: of all rows, int64 [max_num_rows, max_blocks], on the device.
            max_batch: rows of a step.
            batch_invariant: a row's logits do not depend on the rows beside it.
            pdl: whether launches overlap.
        """
        ...

    def device_sampler(self, positions: Tensor, *, pdl: bool = False) -> FrameSampler:
        """What draws frames in steps that a device takes by itself.

        Args:
            positions, pdl: see ``kernels.sampler.DeviceSampler``.
        """
        ...

    def make_framing(self) -> DelayFraming:
        """What turns one request's frames into codec frames."""
        ...

    def first_content(self) -> NDArray[np.int16]:
        """The frame that every request starts with, [num_codebooks]."""
        ...


class CodebookModelState:
    """State of models that emit one code per codebook and frame, under the delay pattern.

    Args:
        model: on ``device``.
        max_num_rows: rows there are.
        device: where the state lives.
    """

    def __init__(self, model: SpeechModel, max_num_rows: int, device: torch.device) -> None:
        spec = model.spec
        self._model = model
        self._device = device
        self._pattern = DelayPattern(spec.num_codebooks, spec.stream_bos_id, spec.stream_eos_id)
        self._head = CodebookState(self._pattern, max_num_rows, device)
        self._sampler = Sampler(self._pattern)
        self._row_ids = torch.arange(max_num_rows, device=device)

    @property
    def num_codebooks(self) -> int:
        return self._pattern.num_codebooks

    def add_request(self, row: int, request: NewRequestData) -> None:
        self._head.add_row(
            row,
            eos_rule=request.sampling_params.eos_rule,
            frame_limit=request.frame_limit,
        )
        self._head.start(self._row_ids[row : row + 1])

    def save_row(self, row: int) -> Any:
        return self._head.save_row(row)

    def restore_row(self, row: int, snapshot: Any) -> None:
        self._head.restore_row(row, snapshot)

    def embed_prompt(self, ids: Tensor, frames: Tensor) -> Tensor:
        parts = []
        if len(ids):
            parts.append(self._model.embed_text(ids))
        if len(frames):
            parts.append(self._model.embed_codes(frames))
        return torch.cat(parts)

    def embed_last_content(self, rows: Tensor) -> Tensor:
        return self._model.embed_codes(self._head.last_frame[rows])

    def next_content(self, hidden: Tensor, rows: Tensor, metadata: SamplingMetadata) -> NextContent:
        logits = self._model.audio_logits(hidden)
        frames = self._sampler.next_frames(logits, rows, metadata, self._head)
        return NextContent(frames, self._head.advance(rows, frames))

    def fused_step(
        self,
        kv_caches: Sequence[Tensor],
        block_tables: Tensor,
        *,
        max_batch: int,
        batch_invariant: bool,
        pdl: DependentLaunch = DependentLaunch.OFF,
    ) -> FusedStep | None:
        spec = self._model.spec
        if not can_fuse(self._device, hidden_size=spec.hidden_size, head_dim=spec.head_dim):
            return None
        return FusedStep(
            self._model.fused_weights(),
            FusedRows(self._head.last_frame, kv_caches, block_tables),
            max_batch=max_batch,
            batch_invariant=batch_invariant,
            pdl=pdl,
        )

    def device_sampler(self, positions: Tensor, *, pdl: bool = False) -> FrameSampler:
        if positions.is_cuda:
            return DeviceSampler(self._head.memory, positions, pdl=pdl)
        return TorchDeviceSampler(self._head, positions)

    def native_step(
        self,
        kv_caches: Sequence[Tensor],
        block_tables: NDArray[np.int64],
        positions: NDArray[np.int64],
        sampling: SamplingMemory,
    ) -> DecodeStep | None:
        spec = self._model.spec
        is_served = can_decode(
            self._device,
            activation_dtype=spec.activation_dtype,
            kv_dtype=kv_caches[0].dtype,
            head_dim=spec.head_dim,
            codebook_size=spec.codebook_size,
        )
        if not is_served:
            return None
        rows = DecoderRows(
            kv_caches=kv_caches,
            block_tables=block_tables,
            positions=positions,
            streams=self._head.memory,
            sampling=sampling,
        )
        return DecodeStep(self._model.decoder_weights(), rows)

    def make_framing(self) -> DelayFraming:
        framing = DelayFraming(self._pattern)
        framing.push(self.first_content()[None])
        return framing

    def first_content(self) -> NDArray[np.int16]:
        return np.full(self._pattern.num_codebooks, self._pattern.bos, np.int16)
