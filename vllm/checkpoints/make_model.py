"""Writes random generation models in either published layout, with tokenizer and configuration.

The weights mean nothing, but are scaled so that sampling behaves: codes vary and streams neither
stop at once nor never. Training is not done here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm.checkpoint_config import CheckpointLayout, HiggsAudioConfig, RopeScaling
from vllm.checkpoints.make_tokenizer import PUBLISHED_FIRST_SPECIAL_ID, make_tokenizer
from vllm.exceptions import CheckpointError
from vllm.model_executor.models.higgs_audio import HiggsAudioModel, boson_tensor_name

__all__ = ["SIZES", "make_model", "random_tensors", "write_checkpoint", "write_configuration"]

SIZES = ("tiny", "medium", "3b")

_INIT_STD = 0.02
_NORM_STD = 0.05  # of gains, around 1
_HEAD_LOGIT_STD = 3.0  # spread of the code logits: sampling filters and RAS all have work
# EOS and BOS rows are shorter than those of codes, so their logits seldom come near the best of a
# thousand codes: a stream runs for hundreds of frames, and EOS stays possible.
_STREAM_MARK_SCALE = 0.7
_SHARD_BYTES = 4_000_000_000
_SPEECH_DEFAULTS = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 0.95,
    "ras_win_len": 7,
    "ras_win_max_num_repeat": 2,
    "use_cache": True,
}


@dataclass(frozen=True)
class _Shape:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    has_published_ids: bool


_SHAPES = {
    "tiny": _Shape(256, 1024, 6, 4, 2, 64, "float32", has_published_ids=False),
    "medium": _Shape(1024, 4096, 16, 16, 8, 64, "float32", has_published_ids=False),
    "3b": _Shape(3072, 8192, 28, 24, 8, 128, "bfloat16", has_published_ids=True),
}


def write_checkpoint(
    out_dir: Path, *, layout: CheckpointLayout = "boson", size: str = "tiny", seed: int = 0
) -> None:
    """Write a model to ``out_dir/lm`` and a codec to ``out_dir/codec``; raises CheckpointError."""
    make_model(out_dir / "lm", layout=layout, size=size, seed=seed)
    # The codec has no size of its own beside tiny and the published one.
    codec = import_module("vllm.checkpoints.make_codec")
    codec_size = "full" if size == "3b" else "tiny"
    codec.make_codec(out_dir / "codec", layout=layout, size=codec_size, seed=seed)


def make_model(
    folder: Path,
    *,
    layout: CheckpointLayout = "boson",
    size: str = "tiny",
    config: HiggsAudioConfig | None = None,
    seed: int = 0,
    with_weights: bool = True,
) -> HiggsAudioConfig:
    """Write a random generation model with everything that loading it needs.

    Args:
        folder: created where needed.
        layout: of configuration and tensors.
        size: tiny, medium, 3b, or the path of a ``config.json`` in either layout.
        config: sizes of the network instead of ``size``; its ids are replaced by the tokenizer's.
        seed: equal seeds give equal files.
        with_weights: write the weights too; ``random_tensors`` makes some that need no disk.

    Returns:
        The configuration written.
    """
    if layout not in ("boson", "transformers"):
        raise CheckpointError(f"layout {layout!r} is none of boson, transformers")
    folder.mkdir(parents=True, exist_ok=True)
    template = config or _template(size)
    config = _with_tokenizer(folder, replace(template, layout=layout))
    raw = write_configuration(folder, config)
    if with_weights:
        _write_weights(folder, config, seed)
    return HiggsAudioConfig.from_dict(raw)


def random_tensors(
    config: HiggsAudioConfig, *, device: torch.device, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Weights of such a model one by one, float32, drawn on ``device`` by transformers' names.

    Of the same kind as those of ``make_model``, but other numbers wherever the device is no CPU.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in _tensor_shapes(config).items():
        yield name, _random_tensor(name, shape, config, generator)


def write_configuration(folder: Path, config: HiggsAudioConfig) -> dict[str, Any]:
    """Write all configuration files of a model in its layout; returns ``config.json``'s content."""
    is_boson = config.layout == "boson"
    raw = _boson_config(config) if is_boson else _transformers_config(config)
    _write_json(folder / "config.json", raw)
    _write_json(folder / "generation_config.json", _generation_config(config))
    if not is_boson:
        _write_json(folder / "processor_config.json", _processor_config(config))
    return raw


def _template(size: str) -> HiggsAudioConfig:
    if size not in _SHAPES:
        path = Path(size)
        if not path.is_file():
            raise CheckpointError(
                f"size {size!r} is none of {', '.join(SIZES)} and no file with a configuration"
            )
        if path.name == "config.json":
            return HiggsAudioConfig.from_folder(path.parent)
        return HiggsAudioConfig.from_dict(_read_json(path))
    shape = _SHAPES[size]
    return HiggsAudioConfig(
        layout="boson",
        architecture="",
        dtype=shape.dtype,
        # Without room for the published ids the tokenizer decides.
        vocab_size=128256 if shape.has_published_ids else 0,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        num_codebooks=8,
        codebook_size=1026,
        stream_bos_id=1024,
        stream_eos_id=1025,
        audio_token_id=0,
        audio_in_token_id=None,
        audio_delay_token_id=None,
        audio_out_bos_token_id=0,
        audio_eos_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _with_tokenizer(folder: Path, config: HiggsAudioConfig) -> HiggsAudioConfig:
    """Write the tokenizer and take its ids; the vocabulary grows to hold them."""
    is_published = config.vocab_size > PUBLISHED_FIRST_SPECIAL_ID
    first = PUBLISHED_FIRST_SPECIAL_ID if is_published else None
    ids = make_tokenizer(folder, first_special_id=first)
    return replace(
        config,
        vocab_size=max(config.vocab_size, ids["vocab_size"]),
        audio_token_id=ids["<|AUDIO_OUT|>"],
        audio_in_token_id=ids["<|AUDIO|>"],
        audio_delay_token_id=ids["<|reserved_special_token_6|>"],
        audio_out_bos_token_id=ids["<|audio_out_bos|>"],
        audio_eos_token_id=ids["<|audio_eos|>"],
        bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=ids["<|eot_id|>"],
        pad_token_id=ids["<|end_of_text|>"],
    )


def _boson_config(config: HiggsAudioConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {}
    if config.rope_scaling is not None:
        rope["rope_scaling"] = {"rope_type": "llama3", **vars(config.rope_scaling)}
    return {
        "architectures": ["HiggsAudioModel"],
        "model_type": "higgs_audio",
        "audio_adapter_type": "dual_ffn_fast_forward",
        "audio_dual_ffn_layers": list(range(config.num_hidden_layers)),
        "audio_ffn_hidden_size": config.hidden_size,
        "audio_ffn_intermediate_size": config.intermediate_size,
        "audio_num_codebooks": config.num_codebooks,
        "audio_codebook_size": config.codebook_size - 2,
        "audio_stream_bos_id": config.stream_bos_id,
        "audio_stream_eos_id": config.stream_eos_id,
        "audio_in_token_idx": config.audio_in_token_id,
        "audio_out_token_idx": config.audio_token_id,
        "audio_out_bos_token_id": config.audio_out_bos_token_id,
        "audio_eos_token_id": config.audio_eos_token_id,
        "audio_decoder_proj_num_layers": 0,
        "audio_embed_avg": False,
        "use_delay_pattern": True,
        "use_audio_out_embed_projector": False,
        "use_audio_out_self_attention": 0,
        "encode_audio_in_tokens": True,
        "encode_whisper_embed": False,
        "skip_audio_tower": True,
        "hidden_size": config.hidden_size,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": config.dtype,
        "text_config": {
            "model_type": "llama",
            **_decoder_fields(config),
            "rope_theta": config.rope_theta,
            **rope,
            "max_position_embeddings": 131072,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "tie_word_embeddings": False,
        },
    }


def _transformers_config(config: HiggsAudioConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **vars(config.rope_scaling)}
    return {
        "architectures": ["HiggsAudioV2ForConditionalGeneration"],
        "model_type": "higgs_audio_v2",
        **_decoder_fields(config),
        "rope_parameters": rope,
        # Above the length from which the frequencies are scaled, so that nobody warns.
        "max_position_embeddings": 131072,
        "num_codebooks": config.num_codebooks,
        "codebook_size": config.codebook_size,
        "audio_token_id": config.audio_token_id,
        "audio_bos_token_id": config.audio_out_bos_token_id,
        "audio_delay_token_id": config.audio_delay_token_id,
        "audio_stream_bos_id": config.stream_bos_id,
        "audio_stream_eos_id": config.stream_eos_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": False,
        "dtype": config.dtype,
    }


def _decoder_fields(config: HiggsAudioConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _generation_config(config: HiggsAudioConfig) -> dict[str, Any]:
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return ids if config.layout == "boson" else ids | _SPEECH_DEFAULTS


def _processor_config(config: HiggsAudioConfig) -> dict[str, Any]:
    return {
        "processor_class": "HiggsAudioV2Processor",
        "audio_token": "<|AUDIO_OUT|>",
        "audio_bos_token": "<|audio_out_bos|>",
        "audio_delay_token": "<|reserved_special_token_6|>",
        "audio_stream_bos_id": config.stream_bos_id,
        "audio_stream_eos_id": config.stream_eos_id,
        "feature_extractor": {
            "feature_extractor_type": "DacFeatureExtractor",
            "feature_size": 1,
            "hop_length": 1,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
            "sampling_rate": 24000,
        },
        "audio_tokenizer": {
            "audio_tokenizer_class": "HiggsAudioV2TokenizerModel",
            "audio_tokenizer_name_or_path": "../codec",
        },
    }


def _write_weights(folder: Path, config: HiggsAudioConfig, seed: int) -> None:
    for stale in (*folder.glob("model*.safetensors"), *folder.glob("*.index.json")):
        stale.unlink()
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(
        config.dtype or "", torch.float32
    )
    shapes = _tensor_shapes(config)
    shards = _plan_shards(shapes, dtype.itemsize)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}  # tensor -> file
    for number, names in enumerate(shards, start=1):
        tensors = {
            _spelled(name, config.layout): _random_tensor(name, shapes[name], config, generator).to(
                dtype
            )
            for name in names
        }
        single = len(shards) == 1
        file_name = (
            "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
    if len(shards) > 1:
        total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _tensor_shapes(config: HiggsAudioConfig) -> dict[str, torch.Size]:
    """Every tensor of a checkpoint by transformers' names, the text head included."""
    with torch.device("meta"):
        network = HiggsAudioModel(config, dtype=torch.float32, max_model_len=1, with_text_head=True)
    return {name: target.shape for name, target in network.targets().items()}


def _plan_shards(shapes: Mapping[str, torch.Size], itemsize: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name, shape in shapes.items():
        size = shape.numel() * itemsize
        if shards[-1] and num_bytes + size > _SHARD_BYTES:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += size
    return shards


def _spelled(name: str, layout: CheckpointLayout) -> str:
    return boson_tensor_name(name) if layout == "boson" else name


def _random_tensor(
    name: str, shape: torch.Size, config: HiggsAudioConfig, generator: torch.Generator
) -> Tensor:
    tensor = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) == 1:
        return tensor.mul_(_NORM_STD).add_(1.0)
    if name == "audio_lm_head.weight":
        # The final norm gives rows of length sqrt(hidden_size).
        tensor.mul_(_HEAD_LOGIT_STD / config.hidden_size**0.5)
        by_code = tensor.view(config.num_codebooks, config.codebook_size, -1)
        by_code[:, [config.stream_bos_id, config.stream_eos_id]] *= _STREAM_MARK_SCALE
        return tensor
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return tensor.mul_(_residual_std(shape[1], config.num_hidden_layers))
    if "_proj.weight" in name:
        return tensor.mul_(shape[1] ** -0.5)
    return tensor.mul_(_INIT_STD)


def _residual_std(in_features: int, num_layers: int) -> float:
    """So that the 2 * num_layers branches together add about as much as one linear map."""
    return float((in_features * 2 * num_layers) ** -0.5)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object")
    return content
