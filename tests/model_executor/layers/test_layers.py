"""Layers whose arithmetic can be written down: rotary frequencies and codebook embedding."""

import math

import pytest
import torch

from vllm.checkpoint_config import RopeScaling
from vllm.model_executor.layers import CodebookEmbedding, RotaryTable, inverse_frequencies

BOSON_ROPE = RopeScaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
TRANSFORMERS_ROPE = RopeScaling(
    factor=32.0,
    low_freq_factor=0.125,
    high_freq_factor=0.5,
    original_max_position_embeddings=1024,
)


def test_both_published_scalings_are_one():
    boson = inverse_frequencies(128, 500000.0, BOSON_ROPE)
    assert torch.equal(boson, inverse_frequencies(128, 500000.0, TRANSFORMERS_ROPE))


def test_scaling_keeps_blends_and_divides_as_published():
    ratio = inverse_frequencies(128, 500000.0, BOSON_ROPE) / inverse_frequencies(
        128, 500000.0, None
    )
    blended = torch.tensor([0.8098, 0.6056, 0.4392, 0.3037, 0.1934, 0.1034])
    torch.testing.assert_close(ratio[:29], torch.ones(29))
    torch.testing.assert_close(ratio[29:35], blended, atol=1e-4, rtol=0)
    torch.testing.assert_close(ratio[35:], torch.full((29,), 1 / 32))


def test_rotary_table_holds_the_angles_of_positions():
    table = RotaryTable(4, 10, 100.0, None, torch.float32)
    cos, signed_sin = table(torch.tensor([7]))
    angles = [7.0, 0.7]
    assert cos.flatten().tolist() == pytest.approx([math.cos(a) for a in angles * 2])
    expected = [-math.sin(a) for a in angles] + [math.sin(a) for a in angles]
    assert signed_sin.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_codebook_embedding_sums_one_row_of_each_codebook():
    embedding = CodebookEmbedding(3, 5, 4, torch.float32)
    embedding.weight.data = torch.arange(15.0).unsqueeze(1).repeat(1, 4)
    codes = torch.tensor([[0, 1, 4], [4, 4, 4]])
    assert embedding(codes)[:, 0].tolist() == [0 + 6 + 14, 4 + 9 + 14]
