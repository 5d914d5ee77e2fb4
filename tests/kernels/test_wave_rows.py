"""Rows that layers compute, against what derivatives say that samples depend on."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.kernels.wave_decoder import WaveLayer
from vllm.kernels.wave_rows import LayerRows, LayerSpan, plan_rows


def layer(kernel_size: int = 1, dilation: int = 1, upsampling: int = 0) -> WaveLayer:
    """Of one channel and ones, so that no derivative cancels another."""
    size = 2 * upsampling if upsampling else kernel_size
    return WaveLayer(torch.ones(1, 1, size).double(), torch.zeros(1), dilation, upsampling)


def convolution(x: torch.Tensor, layer: WaveLayer) -> torch.Tensor:
    if not layer.upsampling:
        return F.conv1d(x, layer.weight, padding="same", dilation=layer.dilation)
    stride = layer.upsampling
    padding, more = -(-stride // 2), stride % 2
    return F.conv_transpose1d(x, layer.weight, stride=stride, padding=padding, output_padding=more)


def rows_with_gradients(chain: list[WaveLayer], num_frames: int, frames: range) -> list[range]:
    """From the first to the last row of each layer's input that samples of ``frames`` depend on."""
    inputs = [torch.ones(1, 1, num_frames, dtype=torch.float64, requires_grad=True)]
    for each in chain:
        inputs[-1].retain_grad()
        inputs.append(convolution(inputs[-1], each))
    samples = inputs.pop()
    hop = samples.shape[2] // num_frames
    samples[..., frames.start * hop : frames.stop * hop].sum().backward()
    found = [values.grad[0, 0].nonzero()[:, 0] for values in inputs]
    return [range(int(rows[0]), int(rows[-1]) + 1) for rows in found]


def plan(chain: list[WaveLayer], num_frames: int, frames: range) -> list[LayerRows]:
    spans = [LayerSpan.of(each) for each in chain]
    return plan_rows(spans, num_frames, frames.start, frames.stop)


chains = st.lists(
    st.one_of(
        st.builds(layer, kernel_size=st.sampled_from([1, 3, 7]), dilation=st.integers(1, 9)),
        st.builds(layer, upsampling=st.integers(2, 5)),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=40, deadline=None)
@given(chain=chains, num_frames=st.integers(1, 40), data=st.data())
def test_all_rows_are_there_that_samples_depend_on(chain, num_frames, data):
    first = data.draw(st.integers(0, num_frames - 1))
    frames = range(first, data.draw(st.integers(first + 1, num_frames)))
    parts = plan(chain, num_frames, frames)
    for part, rows in zip(parts, rows_with_gradients(chain, num_frames, frames), strict=True):
        assert part.inputs.start <= rows.start
        assert rows.stop <= part.inputs.stop
    for before, after in pairwise(parts):
        assert before.outputs == after.inputs


@settings(max_examples=20, deadline=None)
@given(chain=chains, num_frames=st.integers(1, 5))
def test_no_others_are_where_the_window_goes_on(chain, num_frames):
    margin = 3 * 27  # as far as three layers reach at most
    frames = range(margin, margin + num_frames)
    parts = plan(chain, frames.stop + margin, frames)
    rows = rows_with_gradients(chain, frames.stop + margin, frames)
    assert [part.inputs for part in parts] == rows


def test_a_whole_window_has_all_rows():
    spans = [LayerSpan.of(layer(7)), LayerSpan.of(layer(upsampling=5)), LayerSpan.of(layer(7, 9))]
    first, up, last = plan_rows(spans, 12, 0, 12)
    assert (first.inputs, first.steps, first.outputs) == (range(12), range(12), range(12))
    # Rows 0, 1 and 2 of what the first step makes are ahead of the window.
    assert (up.steps, up.shift, up.outputs) == (range(13), 3, range(60))
    assert (last.inputs, last.steps, last.first_row) == (range(60), range(60), 0)


def test_a_part_begins_within_a_step():
    (part,) = plan_rows([LayerSpan.of(layer(upsampling=5))], 12, 4, 5)
    # Rows 20 .. 24 are 23 .. 27 of the product, of which step 4 begins with row 20.
    assert (part.steps, part.shift) == (range(4, 6), 3)
    assert (part.inputs, part.first_row) == (range(3, 6), 1)
