"""Plain torch form of each elementwise or row-wise operation: the definition of correct.

Knows shapes and number types, no layers. Every function treats rows alone: what one row gives
never depends on the other rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "apply_rope",
    "rms_norm",
    "rope_attend",
    "rope_write_attend",
    "rope_write_kv",
    "silu_mul",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of the rows of ``x`` [..., H], times ``weight`` [H].

    Statistics are float32; the normalised value is cast back before it meets the weight.
    """
    if x.dtype == torch.float32:
        return _normalise(x, eps).mul_(weight)
    return _normalise(x.float(), eps).to(x.dtype).mul_(weight)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` for gate and up side by side: [..., 2 * F] -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def apply_rope(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotate the two halves of each head: [N, heads, D] with tables [N, 1, D].

    ``signed_sin`` is the sine with its first half negated, so that the rotation is
    ``x * cos + roll(x, D / 2) * signed_sin``.
    """
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, x.roll(half, dims=-1), signed_sin)


def rope_write_kv(
    qkv: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    num_heads: int,
) -> None:
    """Write the rotated keys, and the values, of new positions to their pages.

    Args:
        qkv: [N, (num_heads + 2 * num_kv_heads) * head_dim]; read only.
        cos: [num_positions, 1, head_dim].
        signed_sin: as ``cos``, the first half of the sines negated.
        cache: [2, num_blocks, num_kv_heads, block_size, head_dim].
        slots: int64 [N], ``block * block_size + offset`` of each row; -1 for padding.
        positions: int64 [N].
        num_heads: of the queries.
    """
    block_size, head_dim = cache.shape[3:]
    used = slots >= 0
    slots, positions = slots[used], positions[used]
    heads = qkv[used].view(len(slots), qkv.shape[1] // head_dim, head_dim)
    keys, values = heads[:, num_heads:].chunk(2, dim=1)
    rotated = apply_rope(keys, cos[positions], signed_sin[positions])
    cache[0, slots // block_size, :, slots % block_size] = rotated.to(cache.dtype)
    cache[1, slots // block_size, :, slots % block_size] = values.to(cache.dtype)


def rope_attend(
    qkv: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    tables: Tensor,
    positions: Tensor,
    num_heads: int,
    scale: float,
) -> Tensor:
    """Attention of rows, rotated here, whose keys and values are in their pages already.

    Args:
        qkv, cos, signed_sin, cache, num_heads: as of ``rope_write_kv``.
        block_tables: int [num_sequences, max_blocks].
        tables: int [N], the sequence of each row.
        positions: int [N], of each row, which sees itself and what comes before; -1 for padding.
        scale: factor on the scores.

    Returns:
        [N, num_heads * head_dim]; zeros for padding.
    """
    num_kv_heads, block_size, head_dim = cache.shape[2:]
    context = qkv.new_zeros(len(qkv), num_heads * head_dim)
    for row, (table, position) in enumerate(zip(tables.tolist(), positions.tolist(), strict=True)):
        if position < 0:
            continue
        heads = qkv[row].view(1, -1, head_dim)[:, :num_heads]
        query = apply_rope(heads, cos[position], signed_sin[position]).float()
        blocks = block_tables[table, : position // block_size + 1].long()
        keys_values = cache[:, blocks].transpose(2, 3).flatten(1, 2)[:, : position + 1]
        keys, values = keys_values.float().transpose(1, 2)  # [num_kv_heads, position + 1, head_dim]
        scores = query.view(num_kv_heads, -1, head_dim) @ keys.transpose(1, 2)
        context[row] = (scores.mul_(scale).softmax(-1) @ values).flatten()
    return context


def rope_write_attend(
    qkv: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    tables: Tensor,
    positions: Tensor,
    num_heads: int,
    scale: float,
) -> Tensor:
    """``rope_write_kv`` of one new position per row, then ``rope_attend``; arguments as of both."""
    block_size = cache.shape[3]
    slots = torch.full_like(positions, -1)
    for row, (table, position) in enumerate(zip(tables.tolist(), positions.tolist(), strict=True)):
        if position >= 0:
            block = block_tables[table, position // block_size]
            slots[row] = block * block_size + position % block_size
    rope_write_kv(qkv, cos, signed_sin, cache, slots, positions, num_heads)
    sight = (block_tables, tables, positions)
    return rope_attend(qkv, cos, signed_sin, cache, *sight, num_heads, scale)


def _normalise(x: Tensor, eps: float) -> Tensor:
    # The norm is one pass over the row where square and mean would be two.
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_square = norm.square_().div_(x.shape[-1])
    return x * mean_square.add_(eps).rsqrt_()
