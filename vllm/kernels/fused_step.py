"""A whole decode step on a device, without a norm, a rotation or a sum of its own.

    last frames -> embed
    each layer     queries, keys, values -> attention -> output + residual -> gate, up -> down + residual
    logits      <- head

Each arrow is one launch on CUDA, so a layer is five; elsewhere the torch forms compute the same.
Memory is the step's own and stays where it is, so that a CUDA graph can hold it. The same step
layer by layer is the model's ``forward``; on a CPU it is ``decode_step``. Knows no model's name and
no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm.kernels.decode_attention import rope_write_attend
from vllm.kernels.dependent_launch import DependentLaunch
from vllm.kernels.linear_config import SUM_WIDTH
from vllm.kernels.quantize import QuantizedWeight, WeightFormat
from vllm.kernels.skinny_linear import (
    LinearWorkspace,
    ResidualRows,
    embed_frames,
    gated_linear,
    normed_linear,
    residual_linear,
)

__all__ = [
    "FusedLayer",
    "FusedRows",
    "FusedStep",
    "FusedWeights",
    "Matrix",
    "can_fuse",
    "product_dtype",
]

Matrix = Tensor | QuantizedWeight  # [num_outputs, num_inputs]

_MIN_HEAD_DIM = 16


@dataclass(frozen=True, eq=False)
class FusedLayer:
    """Weights of one layer: attention, then a gated feed-forward block, each behind its norm."""

    input_norm: Tensor  # [hidden_size]
    qkv: Matrix  # queries, keys and values side by side
    output: Matrix
    post_norm: Tensor  # [hidden_size]
    gate_up: Matrix  # gates, then ups
    down: Matrix


@dataclass(frozen=True, eq=False)
class FusedWeights:
    """Weights of a decoder over positions that hold one code per codebook."""

    embedding: Tensor  # [num_codebooks * codebook_size, hidden_size]
    layers: tuple[FusedLayer, ...]
    norm: Tensor  # [hidden_size]
    head: Matrix  # to num_codebooks * codebook_size
    cos: Tensor  # [num_positions, 1, head_dim]
    signed_sin: Tensor  # as cos, the first half negated
    num_heads: int
    norm_eps: float


@dataclass(frozen=True, eq=False)
class FusedRows:
    """Where the persistent rows are kept, on the device."""

    frames: Tensor  # int64 [max_num_rows, num_codebooks], the last one of each row
    kv_caches: Sequence[Tensor]  # per layer [2, num_blocks, num_kv_heads, block_size, head_dim]
    block_tables: Tensor  # int64 [max_num_rows, max_blocks]


def can_fuse(device: torch.device, *, hidden_size: int, head_dim: int) -> bool:
    """Whether the kernels are for this device and take a model of these sizes."""
    has_heads = head_dim >= _MIN_HEAD_DIM and head_dim.bit_count() == 1
    return device.type == "cuda" and hidden_size % SUM_WIDTH == 0 and has_heads


def _is_fp8(matrix: Matrix) -> bool:
    return isinstance(matrix, QuantizedWeight) and matrix.format is WeightFormat.FP8


def product_dtype(weights: FusedWeights) -> torch.dtype:
    """What inputs of products are made in.

    fp8 becomes float16 in fewer instructions than bfloat16, and float16 holds these inputs.
    """
    dtype = weights.norm.dtype
    has_fp8 = any(_is_fp8(each) for each in (weights.layers[0].qkv, weights.head))
    return torch.float16 if has_fp8 and dtype == torch.bfloat16 else dtype


class FusedStep:
    """Computes logits of rows, and writes the keys and values of their last frames.

    A row's logits are its own in every bit, whatever the other rows of the step are.

    Args:
        weights: on the device, contiguous.
        rows: of all streams.
        max_batch: rows of a step.
        batch_invariant, pdl: see ``LinearWorkspace``.
    """

    def __init__(
        self,
        weights: FusedWeights,
        rows: FusedRows,
        *,
        max_batch: int,
        batch_invariant: bool = True,
        pdl: DependentLaunch = DependentLaunch.OFF,
    ) -> None:
        self._weights = weights
        self._rows = rows
        table = weights.embedding
        device, dtype = table.device, table.dtype
        input_dtype = product_dtype(weights)
        first = weights.layers[0]
        matrices = [weights.head]
        for layer in weights.layers[:1]:  # all layers are alike
            matrices += [layer.qkv, layer.output, layer.gate_up, layer.down]
        self._workspace = LinearWorkspace(
            [(each.shape[0], each.shape[1]) for each in matrices],
            max_batch,
            dtype=dtype,
            device=device,
            batch_invariant=batch_invariant,
            pdl=pdl,
        )
        self._stream = ResidualRows.allocate(max_batch, table.shape[1], dtype, device, input_dtype)
        self._qkv = torch.empty(max_batch, first.qkv.shape[0], dtype=dtype, device=device)
        gated_width = first.gate_up.shape[0] // 2
        self._gated = torch.empty(max_batch, gated_width, dtype=input_dtype, device=device)
        self._logits = torch.empty(max_batch, weights.head.shape[0], device=device)
        # How many splits of a row and head have been attended to; zeros between launches.
        num_arrivals = max_batch * rows.kv_caches[0].shape[2]
        self._arrivals = torch.zeros(num_arrivals, dtype=torch.int32, device=device)

    def __call__(self, rows: Tensor, positions: Tensor, context_len: int) -> Tensor:
        """Logits of a step.

        Args:
            rows: int64 [N], persistent rows.
            positions: int64 [N], where each row's last frame goes; -1 for a row that is idle, whose
                logits mean nothing.
            context_len: no position is this large.

        Returns:
            float32 [N, num_codebooks * codebook_size], overwritten by the next step.
        """
        weights, workspace, eps = self._weights, self._workspace, self._weights.norm_eps
        num_rows = len(rows)
        stream = self._stream.first(num_rows)
        qkv, gated = self._qkv[:num_rows], self._gated[:num_rows]
        gains = [*(layer.input_norm for layer in weights.layers), weights.norm]
        embed_frames(self._rows.frames, rows, weights.embedding, gains[0], stream, workspace)
        for layer, cache, next_gain in zip(
            weights.layers, self._rows.kv_caches, gains[1:], strict=True
        ):
            normed_linear(stream, eps, layer.qkv, qkv, workspace)
            context = self._attend(qkv, cache, rows, positions, context_len)
            residual_linear(context, layer.output, layer.post_norm, stream, workspace)
            gated_linear(stream, eps, layer.gate_up, gated, workspace)
            residual_linear(gated, layer.down, next_gain, stream, workspace)
        logits = self._logits[:num_rows]
        normed_linear(stream, eps, weights.head, logits, workspace)
        return logits

    def _attend(
        self, qkv: Tensor, cache: Tensor, rows: Tensor, positions: Tensor, context_len: int
    ) -> Tensor:
        weights = self._weights
        return rope_write_attend(
            *(qkv, weights.cos, weights.signed_sin, cache, self._rows.block_tables),
            *(rows, positions, weights.num_heads, cache.shape[-1] ** -0.5),
            max_context_len=context_len,
            arrivals=self._arrivals,
            pdl=self._workspace.pdl.is_on,
        )
