"""Multiply-adds that windows of a codec take, counted from its layers and computing none of them.

Knows which rows the kernels compute and how these are cut; knows no time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import torch

from benchmarks._report import format_table
from vllm.checkpoints.make_codec import CODEC_SIZES
from vllm.kernels.conv_config import find_conv_config
from vllm.kernels.wave_decoder import WaveLayer
from vllm.kernels.wave_rows import LayerSpan, plan_rows
from vllm.model_executor.codecs.higgs import HiggsCodec
from vllm.model_executor.codecs.streaming import DEFAULT_RAMP, Window, WindowPlan, WindowShape

__all__ = ["codec_without_values", "format_counts", "multiply_adds", "whole_window", "windows_of"]


@cache
def codec_without_values(size: str) -> HiggsCodec:
    """One of ``CODEC_SIZES``, whose tensors have shapes alone."""
    with torch.device("meta"):
        return HiggsCodec(replace(CODEC_SIZES[size], decode_only=True))


def multiply_adds(codec: HiggsCodec, shape: WindowShape, *, arch: int | None = None) -> int:
    """Of the rows that the samples of one window depend on.

    Args:
        codec: needs no values.
        shape: of the window; one whose frames are all emitted counts all rows.
        arch: count the rows that fill up tiles too, as kernels for this compute capability are cut,
            90 for 9.0.
    """
    layers = list(codec.acoustic_decoder.layers())
    parts = plan_rows([LayerSpan.of(layer) for layer in layers], *shape)
    return sum(
        _filled_up(layer, len(part.steps), arch) * layer.weight.numel()
        for layer, part in zip(layers, parts, strict=True)
    )


def _filled_up(layer: WaveLayer, num_steps: int, arch: int | None) -> int:
    num_outputs, num_inputs = layer.weight.shape[:2]
    if layer.upsampling:
        num_outputs, num_inputs = num_inputs * layer.upsampling, num_outputs
    if arch is None or num_outputs == 1:  # the last layer has no such tiles
        return num_steps
    config = find_conv_config(arch, num_outputs, num_inputs, LayerSpan.of(layer).num_taps)
    return -(-num_steps // config.block_rows) * config.block_rows


def format_counts(size: str, *, num_frames: int, arch: int) -> str:
    """A table of windows of the usual shapes, and of all those of one stream.

    "Alone" is a decode of as many frames as are emitted, without context.
    """
    codec = codec_without_values(size)
    plan = WindowPlan(codec.context_frames, DEFAULT_RAMP, widens_last=True)
    own = [window.shape for window in windows_of(plan, num_frames)]
    recorded = [_recorded(plan, shape) for shape in own]
    cases = [
        *(
            (f"{n} frames, {i} to {j}", j - i, [WindowShape(n, i, j)])
            for n, i, j in plan.usual_shapes
        ),
        (f"stream of {num_frames} frames", num_frames, own),
        ("the same, as recorded", num_frames, recorded),
    ]
    header = ["whole, G", "part, G", "part / whole", f"in tiles of sm_{arch}"]
    header += ["whole / alone", "part / alone"]
    rows = []
    for name, num_emitted, shapes in cases:
        wholes = [whole_window(shape.num_frames) for shape in shapes]
        part, whole = _total(codec, shapes), _total(codec, wholes)
        alone = multiply_adds(codec, whole_window(num_emitted))
        in_tiles = _total(codec, shapes, arch) / _total(codec, wholes, arch)
        ratios = [part / whole, in_tiles, whole / alone, part / alone]
        rows.append([name, whole / 1e9, part / 1e9, *ratios])
    return format_table([f"{size}, multiply-adds", *header], rows)


def windows_of(plan: WindowPlan, num_frames: int) -> list[Window]:
    """Windows of a stream whose frames are all there."""
    windows: list[Window] = []
    emitted = 0
    while (window := plan.next_window(emitted, num_frames, final=True)) is not None:
        windows.append(window)
        emitted = window.emit_stop
    return windows


def whole_window(num_frames: int) -> WindowShape:
    """Of which everything is computed."""
    return WindowShape(num_frames, 0, num_frames)


def _recorded(plan: WindowPlan, shape: WindowShape) -> WindowShape:
    """What is decoded where the usual shapes are recorded."""
    holding = [usual for usual in plan.usual_shapes if usual.holds(shape)]
    return min(holding, key=lambda each: each.last - each.first, default=shape)


def _total(codec: HiggsCodec, shapes: Iterable[WindowShape], arch: int | None = None) -> int:
    return sum(multiply_adds(codec, shape, arch=arch) for shape in shapes)
