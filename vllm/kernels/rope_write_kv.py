"""Rotated keys and values of new positions to their pages: Triton on CUDA, else the reference."""

from __future__ import annotations

from torch import Tensor

from vllm.kernels import reference

__all__ = ["rope_write_kv"]


def rope_write_kv(
    qkv: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    num_heads: int,
) -> None:
    """As ``reference.rope_write_kv``."""
    arguments = (qkv, cos, signed_sin, cache, slots, positions, num_heads)
    if qkv.is_cuda:
        from vllm.kernels.triton import rope_write_kv as on_cuda

        on_cuda.rope_write_kv(*arguments)
    else:
        reference.rope_write_kv(*arguments)
