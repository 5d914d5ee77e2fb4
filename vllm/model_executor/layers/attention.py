"""Grouped-query self-attention over the paged KV cache.

Owns the projections; pages and tiles are ``kernels.attention``'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm.kernels.attention import AttentionPlan, fused_attention, fused_write, paged_attention
from vllm.kernels.cache import write_kv
from vllm.kernels.reference import apply_rope
from vllm.model_executor.layers.layer import Layer
from vllm.model_executor.layers.linear import Linear, PackedLinear

__all__ = ["SelfAttention"]


class SelfAttention(Layer):
    """Causal attention of ``num_heads`` queries over ``num_kv_heads`` keys and values."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        parts = {
            "q_proj": num_heads * head_dim,
            "k_proj": num_kv_heads * head_dim,
            "v_proj": num_kv_heads * head_dim,
        }
        self.qkv = PackedLinear(hidden_size, parts, dtype)
        self.output = Linear(num_heads * head_dim, hidden_size, dtype)
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._scale = head_dim**-0.5

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan
    ) -> Tensor:
        """Store this step's keys and values, then attend.

        Args as of ``store``.
        """
        if plan.fused is not None:
            qkv: Tensor = self.qkv(x)
            context = fused_attention(qkv, *rotary, cache, plan.fused, self._num_heads, self._scale)
        else:
            queries = self._rotate_and_store(x, rotary, cache, plan)
            context = paged_attention(queries, cache, plan, self._scale).flatten(1)
        output: Tensor = self.output(context)
        return output

    def store(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan
    ) -> None:
        """Store this step's keys and values.

        Args:
            x: [N, hidden_size]; rows beyond the plan's are padding.
            rotary: cosines and signed sines of the rows, each [N, 1, head_dim]; of all positions
                where the plan is a fused one.
            cache: of this layer, [2, num_blocks, num_kv_heads, block_size, head_dim].
            plan: of this step.
        """
        if plan.fused is not None:
            fused_write(self.qkv(x), *rotary, cache, plan.fused, self._num_heads)
        else:
            self._rotate_and_store(x, rotary, cache, plan)

    def _rotate_and_store(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan
    ) -> Tensor:
        """Rotated queries [N, num_heads, head_dim]; keys and values are in their pages."""
        heads: Tensor = self.qkv(x).view(x.shape[0], -1, self._head_dim)
        rotated = heads[:, : self._num_heads + self._num_kv_heads]
        rotated.copy_(apply_rope(rotated, *rotary))
        write_kv(cache, plan.written_rows, heads[: plan.num_rows, self._num_heads :])
        return heads[:, : self._num_heads]

    def targets(self, prefix: str) -> dict[str, Tensor]:
        return self.qkv.targets(prefix) | self.output.targets(f"{prefix}.o_proj")
