"""Which rows each layer of a chain of convolutions computes for some of its samples.

Arithmetic on row counts. Knows neither values nor what computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.kernels.wave_decoder import WaveLayer

__all__ = ["LayerRows", "LayerSpan", "plan_rows"]


@dataclass(frozen=True)
class LayerSpan:
    """A layer as a product whose step ``s`` takes input rows around ``s``, one for each tap.

    Attributes:
        num_taps: of these, the middle one, or the latter of two, takes row ``s`` itself.
        dilation: rows between taps.
        phases: rows out for each step.
        shift: phase ``p`` of step ``s`` is row ``s * phases + p - shift`` of the result.
    """

    num_taps: int
    dilation: int
    phases: int
    shift: int

    @classmethod
    def of(cls, layer: WaveLayer) -> LayerSpan:
        if layer.upsampling:
            return cls(2, 1, layer.upsampling, -(-layer.upsampling // 2))
        return cls(layer.weight.shape[2], layer.dilation, 1, 0)

    def steps_for(self, outputs: range) -> range:
        """Steps that some row of ``outputs``, which are not empty, comes from."""
        first, last = outputs.start + self.shift, outputs.stop - 1 + self.shift
        return range(first // self.phases, last // self.phases + 1)

    def inputs_for(self, steps: range) -> range:
        """Rows that ``steps`` take, of which those that do not exist are zeros."""
        before = self.num_taps // 2 * self.dilation
        behind = (self.num_taps - 1) * self.dilation - before
        return range(steps.start - before, steps.stop + behind)


@dataclass(frozen=True)
class LayerRows:
    """What one layer has to do.

    Attributes:
        inputs: rows that are read, all of the window.
        steps: of the product. What these take and ``inputs`` lack is beyond the window's edges,
            where zeros are.
        outputs: rows that are wanted.
        shift: rows that the first step makes ahead of the first one wanted.
    """

    inputs: range
    steps: range
    outputs: range
    shift: int

    @property
    def first_row(self) -> int:
        """Of ``inputs``, the one that the first step is at."""
        return self.steps.start - self.inputs.start


def plan_rows(
    spans: Sequence[LayerSpan], num_frames: int, first_frame: int, last_frame: int
) -> list[LayerRows]:
    """Rows of every layer for the samples of frames ``first_frame .. last_frame - 1``, not empty.

    Args:
        spans: of the layers, the first one first.
        num_frames: of the window.
    """
    assert 0 <= first_frame < last_frame <= num_frames
    lengths = [num_frames]
    for span in spans:
        lengths.append(lengths[-1] * span.phases)
    hop = lengths.pop() // num_frames
    wanted = range(first_frame * hop, last_frame * hop)
    rows: list[LayerRows] = []
    for span, length in zip(reversed(spans), reversed(lengths), strict=True):
        steps = span.steps_for(wanted)
        reached = span.inputs_for(steps)
        inputs = range(max(reached.start, 0), min(reached.stop, length))
        shift = wanted.start + span.shift - steps.start * span.phases
        rows.append(LayerRows(inputs, steps, wanted, shift))
        wanted = inputs
    return rows[::-1]
