"""Every tensor name of the published model in both layouts, split halves, and ignored tensors."""

import pytest
import torch

from vllm.checkpoint_config import HiggsAudioConfig
from vllm.exceptions import CheckpointError
from vllm.model_executor.models.higgs_audio import (
    HiggsAudioModel,
    boson_tensor_name,
    canonical_tensor_name,
    detect_key_layout,
    join_split_tensors,
)

PUBLISHED = {
    "model_type": "higgs_audio_v2",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "codebook_size": 1026,
}


def published_names():
    """(original name, transformers name, shape) of all tensors, as both layouts were published."""
    wide, ffn, kv = 3072, 8192, 1024
    rows = [
        ("embed_tokens.weight", "model.embed_tokens.weight", [128256, wide]),
        (
            "audio_codebook_embeddings.weight",
            "model.embed_audio_tokens.embed_audio_tokens.weight",
            [8208, wide],
        ),
        ("norm.weight", "model.norm.weight", [wide]),
        ("audio_decoder_proj.audio_lm_head.weight", "audio_lm_head.weight", [8208, wide]),
        ("audio_decoder_proj.text_lm_head.weight", "text_lm_head.weight", [128256, wide]),
    ]
    per_layer = {
        "self_attn.q_proj": [wide, wide],
        "self_attn.k_proj": [kv, wide],
        "self_attn.v_proj": [kv, wide],
        "self_attn.o_proj": [wide, wide],
        "input_layernorm": [wide],
        "post_attention_layernorm": [wide],
        "audio_input_layernorm": [wide],
        "audio_post_attention_layernorm": [wide],
    }
    for block in ("mlp", "audio_mlp"):
        per_layer |= {f"{block}.{each}_proj": [ffn, wide] for each in ("gate", "up")}
        per_layer[f"{block}.down_proj"] = [wide, ffn]
    for index in range(28):
        for name, shape in per_layer.items():
            original = f"layers.{index}.{name}.weight"
            rows.append((original, f"model.{original}", shape))
    return rows


@pytest.fixture(scope="module")
def network():
    with torch.device("meta"):
        return HiggsAudioModel(
            HiggsAudioConfig.from_dict(PUBLISHED),
            dtype=torch.bfloat16,
            max_model_len=1,
            with_text_head=True,
        )


def test_all_397_names_map_to_the_network(network):
    names = published_names()
    assert len(names) == 397
    targets = network.targets()
    assert {new: shape for _, new, shape in names} == {
        name: list(target.shape) for name, target in targets.items()
    }
    for original, new, _ in names:
        assert canonical_tensor_name(original) == new
        assert canonical_tensor_name(new) == new
        assert boson_tensor_name(new) == original


def test_parameter_count_is_the_published_one(network):
    assert sum(target.numel() for target in network.targets().values()) == 5_771_283_456
    assert network.spec.kv_bytes_per_position(torch.bfloat16) == 114_688


@pytest.mark.parametrize(
    "name",
    [
        "layers.3.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "audio_codebook_weights",
        "audio_tower.conv1.weight",
        "audio_encoder_proj.linear.weight",
    ],
)
def test_unused_tensors_are_ignored(name):
    assert canonical_tensor_name(name) is None


def test_key_layout_comes_from_the_tensors():
    originals, news, _ = zip(*published_names(), strict=True)
    assert detect_key_layout(originals) == "boson"
    assert detect_key_layout(news) == "transformers"
    with pytest.raises(CheckpointError, match="no Higgs Audio v2 model"):
        detect_key_layout(["encoder.weight"])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("stem", "whole"),
    [
        ("embed_tokens.embedding", "embed_tokens.weight"),
        ("audio_decoder_proj.audio_lm_head.linear", "audio_decoder_proj.audio_lm_head.weight"),
        ("audio_decoder_proj.text_lm_head.linear", "audio_decoder_proj.text_lm_head.weight"),
    ],
)
def test_split_halves_are_joined_frozen_first(stem, whole, reverse):
    halves = [
        (f"{stem}_frozen.weight", torch.zeros(2, 3)),
        (f"{stem}_trainable.weight", torch.ones(1, 3)),
    ]
    joined = dict(join_split_tensors(reversed(halves) if reverse else halves))
    assert list(joined) == [whole]
    assert joined[whole][:, 0].tolist() == [0, 0, 1]


def test_a_lone_half_keeps_its_name():
    lone = [("embed_tokens.embedding_frozen.weight", torch.zeros(2, 3))]
    assert [name for name, _ in join_split_tensors(lone)] == [lone[0][0]]
