"""Rows sorted by what they are, against the form that masks them wherever they stand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm.checkpoints.make_model import _template
from vllm.model_executor.models.higgs_audio import _DualLayer

NUM_ROWS = 12


@pytest.fixture(scope="module")
def layer() -> _DualLayer:
    torch.manual_seed(0)
    layer = _DualLayer(_template("tiny"), torch.float32, torch.float32)
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.1)
    return layer.eval()


def masked(layer: _DualLayer, x: Tensor, is_audio: Tensor) -> tuple[Tensor, Tensor]:
    """Both blocks over all rows, and each row's own chosen: norm and feed-forward."""
    normed = torch.where(is_audio[:, None], layer.audio_input_norm(x), layer.text_input_norm(x))
    fed = torch.where(
        is_audio[:, None],
        layer.audio_ffn(layer.audio_post_norm(x)),
        layer.text_ffn(layer.text_post_norm(x)),
    )
    return normed, fed


@pytest.mark.parametrize("num_text_rows", [0, 1, 7, NUM_ROWS])
@torch.inference_mode()
def test_sorted_rows_get_what_masked_ones_get(layer: _DualLayer, num_text_rows: int) -> None:
    x = torch.randn(NUM_ROWS, _template("tiny").hidden_size)
    is_audio = torch.arange(NUM_ROWS)[torch.randperm(NUM_ROWS)] >= num_text_rows
    order = torch.cat([(~is_audio).nonzero(), is_audio.nonzero()]).flatten()

    normed = layer._normed(x[order], num_text_rows)
    fed = layer._fed_forward(x[order], num_text_rows)

    for actual, expected in zip((normed, fed), masked(layer, x, is_audio), strict=True):
        torch.testing.assert_close(actual, expected[order], rtol=1e-4, atol=1e-5)
