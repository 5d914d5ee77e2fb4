"""Tiny checkpoints of two shapes, each written in both layouts with equal weights."""

from __future__ import annotations

import json

import pytest

from vllm.checkpoints.make_model import make_model

_COMMON = {
    "model_type": "higgs_audio_v2",
    "vocab_size": 400,
    "audio_token_id": 390,
    "audio_bos_token_id": 391,
    "audio_delay_token_id": 392,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "codebook_size": 34,
    "audio_stream_bos_id": 32,
    "audio_stream_eos_id": 33,
}
SHAPES = {
    "two_layers": _COMMON
    | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_codebooks": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "three_layers_scaled_rope": _COMMON
    | {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_codebooks": 4,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 0.125,
            "high_freq_factor": 0.5,
            "original_max_position_embeddings": 16,
        },
    },
}


@pytest.fixture(scope="session", params=SHAPES)
def checkpoint_folders(request, tmp_path_factory):
    """Folders by layout: {"boson": ..., "transformers": ...}."""
    base = tmp_path_factory.mktemp(request.param)
    sizes = base / "sizes.json"
    sizes.write_text(json.dumps(SHAPES[request.param]))
    folders = {}
    for layout in ("boson", "transformers"):
        folders[layout] = base / layout
        make_model(folders[layout], layout=layout, size=str(sizes), seed=3)
    return folders
