"""How products of few rows are cut for a card: a table of shapes, and a rule for all others.

Nothing is tuned while the engine runs. What ``benchmarks.gpu_suite`` finds to be faster (section
micro) is entered in ``linear_configs.json``; entries without times are unmeasured. Knows no kernel
and asks no device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

__all__ = ["ROW_BUCKETS", "SUM_WIDTH", "LinearConfig", "find_config", "row_bucket"]

Provider = Literal["triton", "cublas"]

# Outputs of a tile, and columns of the residual stream that share a sum of squares.
SUM_WIDTH = 64
# Configurations are chosen by the smallest of these that holds the rows; more rows take the last.
# Tiles of rows are as wide as these, and never 8: the tensor cores' instruction would be another,
# with other bits.
ROW_BUCKETS = (16, 32, 64, 128, 256)
_MAX_BLOCK_ROWS = 128

_SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of a block, by compute capability
_SMALL_SHARED_BYTES = 99 << 10  # of all others
# Two blocks of this size fit a multiprocessor of a large card, so that one can start beside another.
_POLITE_BYTES = 112 << 10
_MIN_PROGRAMS = 128  # nearly one for each multiprocessor of a large card
_MAX_SPLITS = 8
_MIN_SPLIT_INPUTS = 512
_FLOAT32_BLOCK_INPUTS = 32  # without tensor cores, larger blocks only make more code
_STAGES = (4, 3, 2)


@dataclass(frozen=True)
class LinearConfig:
    """How one product is cut, and who computes it.

    ``block_inputs`` and ``split_inputs`` decide the order of the sums. They are the same for all
    numbers of rows of a shape, which makes a row's result its own.
    """

    provider: Provider
    block_rows: int  # of a tile
    block_outputs: int  # of a tile; of gates, with as many ups
    block_inputs: int  # of one turn of the main loop
    split_inputs: int  # that one program sums up; a multiple of block_inputs
    num_splits: int  # runs of split_inputs
    is_sequential: bool  # one program sums up all splits of a tile, one after another
    num_warps: int
    num_stages: int  # blocks of inputs on their way at once
    is_measured: bool

    def grid(self, num_rows: int, num_outputs: int) -> tuple[int, int, int]:
        """Programs: tiles of rows, tiles of outputs, splits that run side by side."""
        return (
            -(-num_rows // self.block_rows),
            -(-num_outputs // self.block_outputs),
            1 if self.is_sequential else self.num_splits,
        )

    def num_partials(self, num_rows: int, num_outputs: int) -> int:
        """Partial sums that splits leave for the last of them."""
        row_tiles, output_tiles, num_splits = self.grid(num_rows, num_outputs)
        tile = self.block_rows * self.block_outputs
        return row_tiles * output_tiles * num_splits * tile if num_splits > 1 else 0

    def epilogue(self) -> LinearConfig:
        """The same tiles for a product that somebody else has computed."""
        return replace(self, num_splits=1, is_sequential=True)


@cache
def find_config(
    arch: int,
    num_outputs: int,
    num_inputs: int,
    num_rows: int,
    *,
    input_bytes: int = 2,
    weight_bytes: int = 2,
    is_gated: bool = False,
) -> LinearConfig:
    """The table's entry where there is one, or else what the rule makes of the shape.

    Args:
        arch: compute capability, 90 for 9.0.
        num_outputs: rows of the weight; gates and ups together.
        num_inputs: columns of the weight.
        num_rows: of the input.
        input_bytes: of one number of the input.
        weight_bytes: of one number of the weight.
        is_gated: half of the outputs are gates.
    """
    bucket = row_bucket(num_rows)
    entry = _table().get(f"sm_{arch}", {}).get(f"{num_outputs}x{num_inputs}", {})
    block_inputs = entry.get("block_inputs", 128 if arch >= 90 else 64)
    if input_bytes == 4:
        block_inputs = _FLOAT32_BLOCK_INPUTS
    num_splits = entry.get("num_splits") or _num_splits(num_outputs, num_inputs, is_gated=is_gated)
    assert num_splits == 1 or not is_gated, "gated products are not split"
    split_inputs = _round_up(-(-num_inputs // num_splits), block_inputs)
    num_splits = -(-num_inputs // split_inputs)
    block_rows = min(bucket, _MAX_BLOCK_ROWS)
    stage_bytes = block_inputs * (
        SUM_WIDTH * weight_bytes * (2 if is_gated else 1) + block_rows * input_bytes
    )
    num_programs = -(-num_outputs // SUM_WIDTH) * -(-bucket // block_rows)
    rule = LinearConfig(
        provider="triton",
        block_rows=block_rows,
        block_outputs=SUM_WIDTH,
        block_inputs=block_inputs,
        split_inputs=split_inputs,
        num_splits=num_splits,
        is_sequential=num_splits == 1 or num_programs >= _MIN_PROGRAMS,
        num_warps=8 if block_rows == _MAX_BLOCK_ROWS else 4,
        num_stages=_num_stages(arch, stage_bytes),
        is_measured=False,
    )
    measured = entry.get("rows", {}).get(str(bucket))
    return rule if measured is None else _with_measured(rule, measured)


def row_bucket(num_rows: int) -> int:
    """The bucket of ``ROW_BUCKETS`` that decides for so many rows."""
    return next((bucket for bucket in ROW_BUCKETS if num_rows <= bucket), ROW_BUCKETS[-1])


@cache
def _table() -> Mapping[str, Any]:
    """sm_N -> OUTPUTSxINPUTS -> block_inputs, num_splits, and rows: bucket -> what was measured."""
    text = (files("vllm.kernels") / "linear_configs.json").read_text(encoding="utf-8")
    table: Mapping[str, Any] = json.loads(text)["architectures"]
    return table


def _with_measured(rule: LinearConfig, entry: Mapping[str, Any]) -> LinearConfig:
    choices = {
        name: entry[name]
        for name in ("provider", "block_outputs", "is_sequential", "num_warps", "num_stages")
        if name in entry
    }
    times = (entry["triton_us"], entry["cublas_us"])
    return replace(rule, **choices, is_measured=None not in times)


def _num_splits(num_outputs: int, num_inputs: int, *, is_gated: bool) -> int:
    """Twice as many until there are programs for a whole card, or too few inputs for each."""
    num_splits = 1
    while (
        not is_gated
        and num_splits < _MAX_SPLITS
        and -(-num_outputs // SUM_WIDTH) * num_splits < _MIN_PROGRAMS
        and num_inputs // (2 * num_splits) >= _MIN_SPLIT_INPUTS
    ):
        num_splits *= 2
    return num_splits


def _num_stages(arch: int, stage_bytes: int) -> int:
    """As many as leave room for a second block; or three, or two, where they fit at all."""
    limit = _SHARED_BYTES.get(arch, _SMALL_SHARED_BYTES)
    polite = min(limit, _POLITE_BYTES)
    for num_stages in _STAGES:
        room = polite if num_stages > _STAGES[1] else limit
        if num_stages * stage_bytes <= room:
            return num_stages
    return 1


def _round_up(number: int, quantum: int) -> int:
    return -(-number // quantum) * quantum
