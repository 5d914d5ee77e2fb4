"""Keys and values of prompt positions on a device, from the kernels that decode steps are made of.

    each layer     queries, keys, values -> write, attention
                   text rows, audio rows:  output + residual -> gate, up -> down + residual

Rows are sorted by kind, so each kind's norms and feed-forward block see one run of rows and nothing
is gathered. A row has the same bits in any company, since every product and sum is one that
``skinny_linear`` makes. Knows no model's name and no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vllm.kernels.attention import FusedPlan, fused_attention, fused_write
from vllm.kernels.fused_step import FusedWeights, product_dtype
from vllm.kernels.linear_config import SUM_WIDTH
from vllm.kernels.skinny_linear import (
    LinearWorkspace,
    ResidualRows,
    gated_linear,
    normed_linear,
    residual_linear,
)

__all__ = ["FusedPrefill"]


class FusedPrefill:
    """Fills the KV caches of a decoder whose layers have one feed-forward block per kind of row.

    Args:
        kinds: weights as each kind of row sees them, in the order of the rows; they share those of
            attention.
        max_rows: of a step.
        batch_invariant: see ``LinearWorkspace``.
    """

    def __init__(
        self, kinds: Sequence[FusedWeights], *, max_rows: int, batch_invariant: bool
    ) -> None:
        self.max_rows = max_rows
        self._kinds = kinds
        first = kinds[0].layers[0]
        self._device, self._dtype = kinds[0].norm.device, kinds[0].norm.dtype
        self._product_dtype = product_dtype(kinds[0])
        self._workspace = LinearWorkspace(
            [
                (each.shape[0], each.shape[1])
                for each in (first.qkv, first.output, first.gate_up, first.down)
            ],
            max_rows,
            dtype=self._dtype,
            device=self._device,
            batch_invariant=batch_invariant,
        )

    def __call__(
        self,
        hidden: Tensor,
        num_rows: Sequence[int],
        plan: FusedPlan,
        kv_caches: Sequence[Tensor],
    ) -> None:
        """Write the keys and values of a step's rows.

        Args:
            hidden: [N, hidden_size], input of the first layer.
            num_rows: of each kind; together N.
            plan: of this step.
            kv_caches: one per layer, [2, num_blocks, num_kv_heads, block_size, head_dim].
        """
        shared, eps = self._kinds[0], self._kinds[0].norm_eps
        num_all, hidden_size = hidden.shape
        stream = ResidualRows.allocate(
            num_all, hidden_size, self._dtype, self._device, self._product_dtype
        )
        parts = [part for part in self._parts(stream, num_rows) if len(part[2].hidden)]
        for kind, span, rows in parts:
            _begin(hidden[span], kind.layers[0].input_norm, rows)
        layers = shared.layers
        qkv = hidden.new_empty(num_all, layers[0].qkv.shape[0])
        width = layers[0].gate_up.shape[0] // 2
        gated = hidden.new_empty(num_all, width, dtype=self._product_dtype)
        angles = (shared.cos, shared.signed_sin)
        for index, (layer, cache) in enumerate(zip(layers, kv_caches, strict=True)):
            normed_linear(stream, eps, layer.qkv, qkv, self._workspace)
            if index == len(layers) - 1:
                fused_write(qkv, *angles, cache, plan, shared.num_heads)
                return
            scale = cache.shape[-1] ** -0.5
            context = fused_attention(qkv, *angles, cache, plan, shared.num_heads, scale)
            for kind, span, rows in parts:
                own, following = kind.layers[index], kind.layers[index + 1]
                residual_linear(context[span], own.output, own.post_norm, rows, self._workspace)
                gated_linear(rows, eps, own.gate_up, gated[span], self._workspace)
                residual_linear(gated[span], own.down, following.input_norm, rows, self._workspace)

    def _parts(
        self, stream: ResidualRows, num_rows: Sequence[int]
    ) -> list[tuple[FusedWeights, slice, ResidualRows]]:
        """Of each kind its weights, which rows are of it, and these rows of the stream."""
        bounds = [0]
        for count in num_rows:
            bounds.append(bounds[-1] + count)
        parts = []
        for kind, (start, stop) in zip(self._kinds, pairwise(bounds), strict=True):
            span = slice(start, stop)
            sums = stream.square_sums[:, span]
            rows = ResidualRows(stream.hidden[span], stream.scaled[span], sums)
            parts.append((kind, span, rows))
        return parts


def _begin(hidden: Tensor, gain: Tensor, rows: ResidualRows) -> None:
    """Let the residual stream be ``hidden`` [N, H], ready for a norm of this gain.

    Squares are added two by two, by hand: how torch adds up a row may depend on how many there are.
    """
    rows.hidden.copy_(hidden)
    scaled = hidden.float() * gain.float()
    if rows.scaled.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        scaled = scaled.clamp(-limit, limit)
    rows.scaled.copy_(scaled)
    sums = hidden.float().square().view(len(hidden), -1, SUM_WIDTH)
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    rows.square_sums.copy_(sums[..., 0].t())
