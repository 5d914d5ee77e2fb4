"""Paged attention for prefill and decode, equal in every bit whatever else is in the step.

Keys are taken in tiles that start at fixed positions of their own sequence:

    positions   0 ......... 63 | 64 ........ 127 | 128 ....
    tile              0        |        1        |    2         partial results of each tile
                      └────────┬────────┘             │
                              0+1                     │         then their sum, tile by tile
                               └───────────┬──────────┘

Every matrix product has the shape of one tile, and a masked tile contributes exact zeros, so a
longer neighbour, a chunk boundary or a prefix hit changes no bit. Where the native library serves,
it takes one row at a time over the same tiles instead. On CUDA the rotation and the write to the
pages are part of it (``FusedPlan``). Knows no model and no request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm.kernels import native
from vllm.kernels.cache import cache_rows, slots_of_positions
from vllm.kernels.decode_attention import attend_rows, can_attend, rope_write_attend
from vllm.kernels.prefill_attention import PrefillTiles, plan_tiles, rope_attend
from vllm.kernels.rope_write_kv import rope_write_kv

__all__ = [
    "KEY_TILE",
    "AttentionMetadata",
    "AttentionPlan",
    "DecodeMetadata",
    "FusedPlan",
    "PrefillMetadata",
    "PrefillSequence",
    "TiledPrefillMetadata",
    "fused_attention",
    "fused_write",
    "paged_attention",
    "plan_attention",
    "reads_unwritten",
]

KEY_TILE = 64  # positions
_QUERY_TILE = 64  # rows of one sequence in a prefill


@dataclass(frozen=True, eq=False)
class DecodeMetadata:
    """One new position for each of B requests."""

    slot_mapping: Tensor  # int64 [B], where the new position is stored
    block_tables: Tensor  # int64 [B, max_blocks], unused entries 0
    context_lens: Tensor  # int64 [B], positions including the new one
    max_context_len: int  # on the host

    @classmethod
    def build(
        cls, block_tables: Tensor, context_lens: Sequence[int], block_size: int
    ) -> DecodeMetadata:
        """Metadata from block tables [B, max_blocks] and lengths that include the new position."""
        lens = torch.tensor(context_lens, dtype=torch.int64, device=block_tables.device)
        last = (lens - 1).unsqueeze(1)
        blocks = block_tables.gather(1, last // block_size)
        return cls(
            slot_mapping=(blocks * block_size + last % block_size).squeeze(1),
            block_tables=block_tables,
            context_lens=lens,
            max_context_len=max(context_lens),
        )


@dataclass(frozen=True, eq=False)
class PrefillSequence:
    """A run of positions ``start .. start + length - 1`` of one request.

    Positions before ``start`` are in their pages already, from an earlier chunk or a shared prefix.
    """

    rows: Tensor  # int64 [length], rows of the step in position order
    block_table: Tensor  # int64 [blocks], covers start + length positions
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class PrefillMetadata:
    """Prompt positions of several requests, whose N rows may lie in any order."""

    slot_mapping: Tensor  # int64 [N]
    sequences: tuple[PrefillSequence, ...]

    @classmethod
    def build(cls, sequences: Sequence[PrefillSequence], block_size: int) -> PrefillMetadata:
        """Metadata from sequences whose rows together are 0 .. N - 1."""
        num_rows = sum(sequence.length for sequence in sequences)
        slots = torch.zeros(num_rows, dtype=torch.int64, device=sequences[0].rows.device)
        for each in sequences:
            positions = torch.arange(each.start, each.start + each.length, device=slots.device)
            slots[each.rows] = slots_of_positions(each.block_table, positions, block_size)
        return cls(slot_mapping=slots, sequences=tuple(sequences))


@dataclass(frozen=True, eq=False)
class TiledPrefillMetadata:
    """Prompt positions in tensors of fixed shapes, for a step that is recorded.

    Rows that fill it up are in no tile; they have positions, slots and tables that nobody owns.
    """

    slot_mapping: Tensor  # int64 [N]
    tables: Tensor  # int64 [N], which of the tiles' block tables is the row's
    positions: Tensor  # int64 [N]
    tiles: PrefillTiles

    def read_sequences(self) -> tuple[PrefillSequence, ...]:
        """The same, sequence by sequence; reads the tiles, so only for a CPU."""
        spans: dict[int, list[tuple[int, int, int]]] = {}  # sequence -> position, first row, count
        for sequence, first, count, position in self.tiles.tiles.tolist():
            if count:
                spans.setdefault(sequence, []).append((position, first, count))
        sequences = []
        for sequence, parts in spans.items():
            start, first, _ = min(parts)
            length = sum(count for *_, count in parts)
            rows = self.tiles.rows[first : first + length]
            table = self.tiles.block_tables[sequence]
            sequences.append(PrefillSequence(rows, table, start, length))
        return tuple(sequences)


AttentionMetadata = DecodeMetadata | PrefillMetadata | TiledPrefillMetadata


@dataclass(frozen=True, eq=False)
class _Part:
    """Queries that share their gathered keys: a decode batch, or one sequence of a prefill."""

    rows: Tensor | None  # int64 [queries], None for all rows of the step in their order
    runs: Tensor  # int64 [2 * S * tiles * num_kv_heads * KEY_TILE / run], see _runs
    run: int  # neighbouring positions that are copied at once
    num_sequences: int  # S
    num_tiles: int
    # float32 [S, tiles, 1, queries or 1, 1, KEY_TILE], 0 or -inf; one per query tile
    biases: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class _Sight:
    """What each row sees: positions up to its own of the sequence with its block table."""

    block_tables: Tensor  # int64 [num_sequences, max_blocks]
    tables: Tensor  # int64 [N], the sequence of each row
    positions: Tensor  # int64 [N]


@dataclass(frozen=True, eq=False)
class FusedPlan:
    """A step whose rows are rotated and written where they are attended to."""

    slots: Tensor  # int64 [N]
    sight: _Sight
    tiles: PrefillTiles | None  # of a prefill
    max_context_len: int  # of a decode step


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Everything about a step's attention that all layers share, worked out once."""

    num_rows: int  # N
    written_rows: Tensor  # int64 [N * 2 * num_kv_heads], where keys and values are stored
    parts: tuple[_Part, ...]  # none where the library attends
    sight: _Sight | None  # for the library
    # Instead of all of the above: layers call ``fused_attention`` with the tables of all positions'
    # angles, and not ``write_kv`` and ``paged_attention`` with rotated rows.
    fused: FusedPlan | None = None


def plan_attention(metadata: AttentionMetadata, cache: Tensor) -> AttentionPlan:
    """Prepare a step from its metadata and any layer's cache."""
    if _is_fused(cache):
        fused = _plan_fused(metadata)
        return AttentionPlan(len(fused.slots), fused.slots, parts=(), sight=None, fused=fused)
    is_native = _is_native(cache)
    return AttentionPlan(
        num_rows=metadata.slot_mapping.shape[0],
        written_rows=cache_rows(metadata.slot_mapping, cache),
        parts=() if is_native else _plan_parts(metadata, cache),
        sight=_see(metadata) if is_native else None,
    )


def reads_unwritten(cache: Tensor) -> bool:
    """Whether attention reads positions that were never written, so that they must be numbers."""
    return not _is_fused(cache)


def paged_attention(query: Tensor, cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Attention of queries over the pages of their own sequences.

    Args:
        query: [N, num_heads, head_dim]; the step's keys are in the cache already.
        cache: [2, num_blocks, num_kv_heads, block_size, head_dim]; of another number type than the
            query's, it is computed with in that of the query.
        plan: of this step.
        scale: factor on the scores.

    Returns:
        [N, num_heads, head_dim]. Rows beyond those of the plan are padding and come back as zeros.
    """
    if plan.sight is not None:
        return _pad(_attend_natively(query[: plan.num_rows], cache, plan.sight, scale), query)
    if plan.parts and plan.parts[0].rows is None:
        (part,) = plan.parts
        return _pad(_attend_decode(query[: part.num_sequences], cache, part, scale), query)
    output = torch.zeros_like(query)
    for part in plan.parts:
        assert part.rows is not None
        output[part.rows] = _attend_sequence(query[part.rows], cache, part, scale)
    return output


def fused_attention(
    qkv: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    plan: FusedPlan,
    num_heads: int,
    scale: float,
) -> Tensor:
    """Rotate the step's rows, store their keys and values, and attend.

    Args:
        qkv: [N, (num_heads + 2 * num_kv_heads) * head_dim], contiguous; may be rotated in place.
        cos, signed_sin: of all positions, each [num_positions, 1, head_dim].
        cache: [2, num_blocks, num_kv_heads, block_size, head_dim].
        plan: of this step.
        num_heads: of the queries.
        scale: factor on the scores.

    Returns:
        [N, num_heads * head_dim]. Rows beyond those of the plan are padding and come back as zeros.
    """
    rows, sight = qkv[: len(plan.slots)], plan.sight
    if plan.tiles is None:
        context = rope_write_attend(
            *(rows, cos, signed_sin, cache, sight.block_tables, sight.tables, sight.positions),
            *(num_heads, scale),
            max_context_len=plan.max_context_len,
        )
    else:
        fused_write(qkv, cos, signed_sin, cache, plan, num_heads)
        context = rope_attend(rows, cos, signed_sin, cache, plan.tiles, num_heads, scale)
    return _pad(context, qkv)


def fused_write(
    qkv: Tensor, cos: Tensor, signed_sin: Tensor, cache: Tensor, plan: FusedPlan, num_heads: int
) -> None:
    """The part of ``fused_attention`` that later steps need: rotated keys, and values."""
    rows = qkv[: len(plan.slots)]
    rope_write_kv(rows, cos, signed_sin, cache, plan.slots, plan.sight.positions, num_heads)


def _is_fused(cache: Tensor) -> bool:
    head_dim = cache.shape[-1]
    return cache.is_cuda and head_dim >= 16 and head_dim.bit_count() == 1


def _plan_fused(metadata: AttentionMetadata) -> FusedPlan:
    if isinstance(metadata, DecodeMetadata):
        tiles, max_context_len = None, metadata.max_context_len
    elif isinstance(metadata, TiledPrefillMetadata):
        tiles, max_context_len = metadata.tiles, 0
    else:
        max_context_len = 0
        tiles = plan_tiles(
            [each.rows for each in metadata.sequences],
            [each.block_table for each in metadata.sequences],
            [each.start for each in metadata.sequences],
        )
    return FusedPlan(
        slots=metadata.slot_mapping,
        sight=_see(metadata),
        tiles=tiles,
        max_context_len=max_context_len,
    )


def _pad(context: Tensor, query: Tensor) -> Tensor:
    """``context`` with rows of zeros up to the number of ``query``'s."""
    missing = query.shape[0] - context.shape[0]
    return F.pad(context, (0, 0) * (context.dim() - 1) + (0, missing)) if missing else context


def _is_native(cache: Tensor) -> bool:
    return (
        native.loaded_library() is not None
        and cache.device.type == "cpu"
        and can_attend(cache.dtype, cache.shape[-1])
    )


def _see(metadata: AttentionMetadata) -> _Sight:
    if isinstance(metadata, DecodeMetadata):
        rows = torch.arange(len(metadata.context_lens), device=metadata.context_lens.device)
        return _Sight(metadata.block_tables.contiguous(), rows, metadata.context_lens - 1)
    if isinstance(metadata, TiledPrefillMetadata):
        return _Sight(metadata.tiles.block_tables, metadata.tables, metadata.positions)
    tables = torch.empty_like(metadata.slot_mapping)
    positions = torch.empty_like(metadata.slot_mapping)
    for index, each in enumerate(metadata.sequences):
        tables[each.rows] = index
        positions[each.rows] = torch.arange(
            each.start, each.start + each.length, device=positions.device
        )
    block_tables = [each.block_table for each in metadata.sequences]
    return _Sight(pad_sequence(block_tables, batch_first=True).contiguous(), tables, positions)


def _attend_natively(query: Tensor, cache: Tensor, sight: _Sight, scale: float) -> Tensor:
    rows = query.float()
    if rows.stride()[1:] != (rows.shape[2], 1):
        rows = rows.contiguous()
    context = attend_rows(rows, cache, sight.block_tables, sight.tables, sight.positions, scale)
    return context.to(query.dtype)


@dataclass(frozen=True)
class _Geometry:
    num_blocks: int
    block_size: int
    num_kv_heads: int

    @property
    def run(self) -> int:
        """Positions that lie together in the cache and in a tile."""
        return math.gcd(self.block_size, KEY_TILE)


def _plan_parts(metadata: AttentionMetadata, cache: Tensor) -> tuple[_Part, ...]:
    _, num_blocks, num_kv_heads, block_size, _ = cache.shape
    geometry = _Geometry(num_blocks, block_size, num_kv_heads)
    if isinstance(metadata, DecodeMetadata):
        return (_plan_decode(metadata, geometry),)
    if isinstance(metadata, TiledPrefillMetadata):
        return tuple(_plan_sequence(each, geometry) for each in metadata.read_sequences())
    return tuple(_plan_sequence(each, geometry) for each in metadata.sequences)


def _plan_decode(metadata: DecodeMetadata, geometry: _Geometry) -> _Part:
    num_tiles = -(-metadata.max_context_len // KEY_TILE)
    positions = torch.arange(num_tiles * KEY_TILE, device=metadata.block_tables.device)
    is_visible = positions < metadata.context_lens.unsqueeze(1)
    bias = _bias(is_visible)
    return _Part(
        rows=None,
        runs=_runs(metadata.block_tables, is_visible, geometry),
        run=geometry.run,
        num_sequences=is_visible.shape[0],
        num_tiles=num_tiles,
        biases=(bias.view(-1, num_tiles, 1, 1, 1, KEY_TILE),),
    )


def _plan_sequence(sequence: PrefillSequence, geometry: _Geometry) -> _Part:
    end = sequence.start + sequence.length
    num_tiles = -(-end // KEY_TILE)
    positions = torch.arange(num_tiles * KEY_TILE, device=sequence.rows.device)
    biases = []
    for first in range(sequence.start, end, _QUERY_TILE):
        # Rows that fill up the last query tile see what the last query sees, so none is empty.
        queries = torch.arange(first, first + _QUERY_TILE, device=positions.device).clamp(
            max=end - 1
        )
        tiles = -(-min(first + _QUERY_TILE, end) // KEY_TILE)
        keys = positions[: tiles * KEY_TILE].view(1, tiles, 1, 1, 1, KEY_TILE)
        biases.append(_bias(keys <= queries.view(1, 1, 1, _QUERY_TILE, 1, 1)))
    return _Part(
        rows=sequence.rows,
        runs=_runs(sequence.block_table.unsqueeze(0), (positions < end).unsqueeze(0), geometry),
        run=geometry.run,
        num_sequences=1,
        num_tiles=num_tiles,
        biases=tuple(biases),
    )


def _bias(is_visible: Tensor) -> Tensor:
    return torch.zeros(is_visible.shape, device=is_visible.device).masked_fill_(
        ~is_visible, float("-inf")
    )


def _runs(block_tables: Tensor, is_visible: Tensor, geometry: _Geometry) -> Tensor:
    """Rows of the cache, seen as [-1, run * head_dim], that gather to whole tiles.

    Their order is [key or value, sequence, tile, kv head, run in tile], so that a gather gives
    operands of matrix products without a transpose. A run of which nothing is visible takes the
    sequence's first run: it is masked, but what it reads must be a number, and a block that the
    sequence does not own may hold anything.
    """
    run, num_heads = geometry.run, geometry.num_kv_heads
    runs_per_block = geometry.block_size // run
    starts = torch.arange(0, is_visible.shape[1], run, device=block_tables.device)
    blocks = (starts // geometry.block_size).clamp(max=block_tables.shape[1] - 1)
    blocks = torch.where(is_visible[:, ::run], block_tables[:, blocks], block_tables[:, :1])
    in_block = starts // run % runs_per_block * is_visible[:, ::run]
    heads = torch.arange(num_heads, device=blocks.device).view(1, 1, -1, 1)
    shape = (blocks.shape[0], -1, 1, KEY_TILE // run)
    keys = (blocks.view(shape) * num_heads + heads) * runs_per_block + in_block.view(shape)
    keys = keys.flatten()
    return torch.cat([keys, keys + geometry.num_blocks * num_heads * runs_per_block])


def _gather(cache: Tensor, part: _Part, dtype: torch.dtype) -> Tensor:
    """Keys and values of a part, in ``dtype``: [2, S, tiles, num_kv_heads, KEY_TILE, head_dim]."""
    num_kv_heads, _, head_dim = cache.shape[-3:]
    runs = cache.view(-1, part.run * head_dim).index_select(0, part.runs)
    shape = (2, part.num_sequences, part.num_tiles, num_kv_heads, KEY_TILE, head_dim)
    return runs.view(shape).to(dtype)


def _attend_decode(query: Tensor, cache: Tensor, part: _Part, scale: float) -> Tensor:
    keys, values = _gather(cache, part, query.dtype)
    num_kv_heads, _, head_dim = cache.shape[-3:]
    grouped = query.reshape(part.num_sequences, num_kv_heads, -1, head_dim)
    context = _attend_tiles(grouped, keys, values, part.biases[0], scale)
    return context.reshape(query.shape)


def _attend_sequence(query: Tensor, cache: Tensor, part: _Part, scale: float) -> Tensor:
    keys, values = _gather(cache, part, query.dtype)
    num_kv_heads, _, head_dim = cache.shape[-3:]
    num_queries, num_heads, _ = query.shape
    missing = -num_queries % _QUERY_TILE
    padded = F.pad(query, (0, 0, 0, 0, 0, missing))
    contexts = []
    for tile, bias in zip(torch.split(padded, _QUERY_TILE), part.biases, strict=True):
        num_tiles = bias.shape[1]
        grouped = tile.view(_QUERY_TILE, num_kv_heads, -1, head_dim).transpose(0, 1)
        flat = grouped.reshape(1, num_kv_heads, -1, head_dim)
        context = _attend_tiles(flat, keys[:, :num_tiles], values[:, :num_tiles], bias, scale)
        by_query = context.view(num_kv_heads, _QUERY_TILE, -1, head_dim).transpose(0, 1)
        contexts.append(by_query.reshape(_QUERY_TILE, num_heads, head_dim))
    return torch.cat(contexts)[:num_queries]


def _attend_tiles(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float
) -> Tensor:
    """Softmax attention over key tiles.

    Args:
        query: [S, num_kv_heads, R, head_dim], R rows that share a KV head.
        keys, values: [S, tiles, num_kv_heads, KEY_TILE, head_dim].
        bias: [S, tiles, 1, queries or 1, 1, KEY_TILE]; a query has R / queries rows.

    Returns:
        [S, num_kv_heads, R, head_dim] in the query's number type.
    """
    # One product per tile and head: its shape, and with it the order of its sums, is fixed.
    scores = torch.matmul(query.unsqueeze(1), keys.transpose(-1, -2))
    by_query = scores.view(*scores.shape[:3], bias.shape[3], -1, KEY_TILE)
    scores = torch.add(bias, by_query, alpha=scale).view(scores.shape)
    # The maximum is exact in any order, so one of all tiles serves where a running one would not.
    weights = scores.sub_(scores.amax(dim=(1, 4), keepdim=True)).exp_()
    totals = _sum_tiles(weights.sum(dim=-1, keepdim=True))
    partial = torch.matmul(weights.to(values.dtype), values)
    return (_sum_tiles(partial.float()) / totals).to(query.dtype)


def _sum_tiles(partial: Tensor) -> Tensor:
    """Sum over dim 1, in place. One tile after the other, as ``Tensor.sum`` does not promise."""
    total, *others = partial.unbind(1)
    for other in others:
        total.add_(other)
    return total
