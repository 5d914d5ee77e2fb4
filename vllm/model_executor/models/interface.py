"""What the engine may ask of a speech language model, whatever its family.

Types only; a model's network, weights and file layout are its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vllm.kernels.decode_step import DecoderWeights
from vllm.kernels.fused_step import FusedWeights
from vllm.kernels.quantize import WeightFormat

__all__ = ["ModelSpec", "SpeechModel"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes and ids that the engine needs to run a model.

    ``codebook_size`` counts the stream's BOS and EOS too: it is the width of one head.
    """

    architecture: str
    layout: str
    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_codebooks: int
    codebook_size: int
    stream_bos_id: int
    stream_eos_id: int
    dtype: torch.dtype  # of the weights
    activation_dtype: torch.dtype  # of what goes from layer to layer
    max_model_len: int

    def kv_bytes_per_position(self, kv_dtype: torch.dtype) -> int:
        """Bytes that one position takes of a KV cache of ``kv_dtype``, over all layers."""
        per_layer = 2 * self.num_kv_heads * self.head_dim * kv_dtype.itemsize
        return self.num_layers * per_layer


class SpeechModel(Protocol):
    """A decoder over text and audio positions with one head per codebook."""

    @property
    def spec(self) -> ModelSpec: ...

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
        with_text_head: bool,
        quantization: WeightFormat | None,
    ) -> SpeechModel:
        """Build the network and fill it from a checkpoint folder; raises CheckpointError."""
        ...

    def embed_text(self, ids: Tensor) -> Tensor:
        """int64 [N] -> [N, hidden_size]."""
        ...

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Delayed frames, int64 [N, num_codebooks] -> [N, hidden_size]."""
        ...

    def forward(self, hidden: Tensor, positions: Tensor, num_text_rows: int) -> Tensor:
        """Run all layers inside a forward context.

        Args:
            hidden: [N, hidden_size], text rows first, then audio rows.
            positions: int64 [N].
            num_text_rows: rows of ``hidden`` that are text; 0 in an audio-only decode.

        Returns:
            [N, hidden_size] after the final norm, in the order of ``hidden``.
        """
        ...

    def fill_cache(self, hidden: Tensor, positions: Tensor, num_text_rows: int) -> None:
        """As ``forward``, for the keys and values alone."""
        ...

    def audio_logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden_size] -> float32 [N, num_codebooks, codebook_size]."""
        ...

    def text_logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden_size] -> float32 [N, vocab_size]; only when loaded with the text head."""
        ...

    def decoder_weights(self) -> DecoderWeights:
        """For native decode steps; only where ``kernels.decode_step.can_decode``."""
        ...

    def fused_weights(self) -> FusedWeights:
        """For steps that a device takes; only where ``kernels.fused_step.can_fuse``."""
        ...

    def matrices(self) -> Iterator[Tensor]:
        """Weights [M, K] of the products that torch computes, for the check of row invariance."""
        ...

    @property
    def largest_matrix(self) -> int:
        """Weights of the largest matrix."""
        ...

    def set_row_quantum(self, quantum: int) -> None:
        """Let every product run on a multiple of so many rows, see ``kernels.linear``."""
        ...
