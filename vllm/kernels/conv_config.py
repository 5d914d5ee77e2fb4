"""How convolutions over time are cut for a card: a table of shapes, and a rule for all others.

Nothing is tuned while the engine runs. Entries of ``conv_configs.json`` without times are
unmeasured. Knows no kernel and asks no device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["CHANNEL_QUANTUM", "ConvConfig", "find_conv_config"]

# Channels are filled up with zeros to a multiple of this: what one instruction of the tensor cores
# takes at once.
CHANNEL_QUANTUM = 16

_MAX_BLOCK_OUTPUTS = 128
_WIDE_OUTPUTS = 512  # with as many there are few rows, and smaller tiles make more programs
_BLOCK_INPUTS = 32
_LARGE_BLOCK_INPUTS = 64
_NUM_STAGES = 3
_SMALL_STAGES = 4  # of Hopper's smaller tiles, two of which share a multiprocessor


@dataclass(frozen=True)
class ConvConfig:
    """How one convolution is cut: the same for any number of windows, and for any length."""

    block_rows: int  # of a tile: positions of one window
    block_outputs: int  # of a tile
    block_inputs: int  # channels of one turn of the main loop, all of one tap
    num_warps: int
    num_stages: int  # turns whose loads are on their way at once
    is_measured: bool = False

    def grid(self, batch: int, num_rows: int, num_outputs: int) -> tuple[int, int, int]:
        """Programs: tiles of rows, tiles of outputs, windows."""
        return (-(-num_rows // self.block_rows), -(-num_outputs // self.block_outputs), batch)


@cache
def find_conv_config(arch: int, num_outputs: int, num_inputs: int, num_taps: int) -> ConvConfig:
    """The table's entry where there is one, or else what the rule makes of the shape.

    Args:
        arch: compute capability, 90 for 9.0.
        num_outputs: columns of the product, those of all phases together.
        num_inputs: channels.
        num_taps: rows of the input that one row of the product takes.
    """
    rule = _rule(arch, num_outputs, num_inputs)
    entry = _table().get(f"sm_{arch}", {}).get(f"{num_outputs}x{num_inputs}x{num_taps}")
    if entry is None:
        return rule
    choices = {name: value for name, value in entry.items() if not name.endswith("_us")}
    times = (entry["triton_us"], entry["cudnn_us"])
    return replace(rule, **choices, is_measured=None not in times)


def _rule(arch: int, num_outputs: int, num_inputs: int) -> ConvConfig:
    block_outputs = CHANNEL_QUANTUM
    while block_outputs < min(num_outputs, _MAX_BLOCK_OUTPUTS):
        block_outputs *= 2
    is_narrow = block_outputs < _MAX_BLOCK_OUTPUTS
    # Products of earlier cards keep what they multiply in registers, of which a tile of 128 by 128
    # leaves too few.
    is_large = arch >= 90 and not is_narrow and num_outputs < _WIDE_OUTPUTS
    block_inputs = _LARGE_BLOCK_INPUTS if is_large else _BLOCK_INPUTS
    while num_inputs % block_inputs:
        block_inputs //= 2
    return ConvConfig(
        block_rows=128 if is_narrow or is_large else 64,
        block_outputs=block_outputs,
        block_inputs=block_inputs,
        num_warps=8 if is_large else 4,
        num_stages=_SMALL_STAGES if arch >= 90 and not is_large else _NUM_STAGES,
    )


@cache
def _table() -> Mapping[str, Any]:
    """sm_N -> OUTPUTSxINPUTSxTAPS -> what was chosen and, where null does not stand, measured."""
    text = (files("vllm.kernels") / "conv_configs.json").read_text(encoding="utf-8")
    table: Mapping[str, Any] = json.loads(text)["architectures"]
    return table
