"""Writes a random Llama with the layers of a Higgs Audio checkpoint, for peers that know no speech.

Its vocabulary is as large as all codebooks together, so that both have heads of one size. Knows
nothing of what is measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm.checkpoint_config import HiggsAudioConfig
from vllm.kernels.quantize import WeightFormat, quantize

__all__ = ["make_llama"]

_INIT_STD = 0.02
_INT8_ARGS = {"num_bits": 8, "type": "int", "symmetric": True}


def make_llama(folder: Path, like: HiggsAudioConfig, *, int8: bool = False) -> None:
    """Write ``config.json`` and ``model.safetensors``, in float32 or with int8 matrices.

    Int8 is the "int-quantized" form of compressed-tensors: a scale for each output row, and rows
    of activations rounded as they come. The head stays in float32, as is usual there.
    """
    folder.mkdir(parents=True)
    config = _config(like)
    weights = _weights(like)
    if int8:
        config["quantization_config"] = _int8_config()
        weights = _to_int8(weights)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _config(like: HiggsAudioConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": like.hidden_size,
        "intermediate_size": like.intermediate_size,
        "num_hidden_layers": like.num_hidden_layers,
        "num_attention_heads": like.num_attention_heads,
        "num_key_value_heads": like.num_key_value_heads,
        "head_dim": like.head_dim,
        "vocab_size": like.num_codebooks * like.codebook_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": like.rms_norm_eps,
        "rope_theta": like.rope_theta,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
    }


def _weights(like: HiggsAudioConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, inner = like.hidden_size, like.intermediate_size
    queries = like.num_attention_heads * like.head_dim
    keys = like.num_key_value_heads * like.head_dim
    vocab = like.num_codebooks * like.codebook_size
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocab, hidden),
        "model.norm": (hidden,),
        "lm_head": (vocab, hidden),
    }
    for index in range(like.num_hidden_layers):
        prefix = f"model.layers.{index}."
        shapes |= {prefix + name: shape for name, shape in layer.items()}
        shapes[prefix + "input_layernorm"] = shapes[prefix + "post_attention_layernorm"] = (hidden,)
    return {
        f"{name}.weight": torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * _INIT_STD
        for name, shape in shapes.items()
    }


def _to_int8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, weight in weights.items():
        if "_proj" not in name:
            result[name] = weight
            continue
        rounded = quantize(weight, WeightFormat.INT8)
        result[name] = rounded.values
        result[f"{name}_scale"] = rounded.scales[:, None]
    return result


def _int8_config() -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _INT8_ARGS | {"strategy": "channel", "dynamic": False},
                "input_activations": _INT8_ARGS | {"strategy": "token", "dynamic": True},
            }
        },
    }
