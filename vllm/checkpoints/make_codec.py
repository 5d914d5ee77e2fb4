"""Writes random Higgs codec checkpoints in either published layout, for tests and first starts.

Knows sizes, names and shapes; what it writes makes noise, not speech.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm.exceptions import ConfigError
from vllm.model_executor.codecs.higgs import HiggsCodec, HiggsCodecConfig
from vllm.model_executor.codecs.hubert import HubertConfig

__all__ = ["CODEC_SIZES", "make_codec", "write_codec"]

Layout = Literal["boson", "transformers"]

# size -> configuration. "tiny" keeps the published hop, codebooks and codes, and is narrow.
CODEC_SIZES: dict[str, HiggsCodecConfig] = {
    "full": HiggsCodecConfig(),
    "tiny": HiggsCodecConfig(
        codebook_dim=8,
        acoustic_size=16,
        encoder_size=4,
        decoder_size=64,
        hubert=HubertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            conv_dim=(16,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
        ),
    ),
}


def make_codec(
    folder: Path, *, layout: Layout, size: str, seed: int, decode_only: bool = False
) -> None:
    """Write ``config.json`` and the weights of a random codec into ``folder``, made if needed.

    Args:
        layout: "transformers" writes ``model.safetensors`` with plain weights; "boson" writes
            ``model.pth`` under the original names, with weight norm split.
        size: a key of ``CODEC_SIZES``.
        seed: equal seeds give equal weights in either layout.
        decode_only: leave the encoder out and say so in the configuration.

    Raises:
        ConfigError: ``layout`` or ``size`` is unknown.
    """
    if size not in CODEC_SIZES:
        raise ConfigError(f"codec size={size!r} is none of {', '.join(CODEC_SIZES)}")
    if layout not in ("boson", "transformers"):
        raise ConfigError(f"codec layout={layout!r} is neither boson nor transformers")
    config = replace(CODEC_SIZES[size], decode_only=decode_only)
    write_codec(folder, config, _random_tensors(config, seed), layout=layout)


def write_codec(
    folder: Path, config: HiggsCodecConfig, tensors: dict[str, Tensor], *, layout: Layout
) -> None:
    """Write a codec whose tensors have transformers' names, weight norm folded."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "boson":
        tensors = dict(pair for item in tensors.items() for pair in _boson_tensors(*item, config))
        torch.save(tensors, folder / "model.pth")
        written = _boson_config(config)
    else:
        tensors = dict(pair for item in tensors.items() for pair in _split_positional(*item))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        written = _transformers_config(config)
    text = json.dumps(written, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _random_tensors(config: HiggsCodecConfig, seed: int) -> dict[str, Tensor]:
    """Tensors by transformers' names, parts that only training needs included.

    Drawn in a fixed order from one generator, decoder first, so that leaving the encoder out does
    not change the rest.
    """
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in HiggsCodec(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    is_encoder = re.compile(r"acoustic_encoder|encoder_semantic|semantic_model|fc\.|.*project_in")
    names = sorted(shapes, key=lambda name: (is_encoder.match(name) is not None, name))
    tensors = {name: _random_tensor(name, shapes[name], generator) for name in names}
    for index in range(config.num_codebooks):
        prefix = f"quantizer.quantizers.{index}.codebook."
        tensors[f"{prefix}inited"] = torch.ones(1)
        tensors[f"{prefix}cluster_size"] = torch.ones(config.codebook_size)
        # NOTE: an accumulator several times larger than the codebook, as in published files; a
        # loader that takes it for the codebook is found out.
        tensors[f"{prefix}embed_avg"] = 5.0 * tensors[f"{prefix}embed"]
    if not config.decode_only:
        for name, shape in _training_shapes(config).items():
            tensors[name] = _random_tensor(name, shape, generator)
    return tensors


def _training_shapes(config: HiggsCodecConfig) -> dict[str, tuple[int, ...]]:
    width = config.hubert.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "fc1.weight": (width, config.quantizer_size),
        "fc1.bias": (width,),
        "decoder_semantic.conv1.weight": (width, width, config.semantic_kernel),
        "decoder_semantic.conv2.weight": (width, width, config.semantic_kernel),
        "semantic_model.masked_spec_embed": (width,),
    }
    for block in range(config.num_semantic_blocks):
        prefix = f"decoder_semantic.conv_blocks.{block}"
        shapes[f"{prefix}.conv.weight"] = (width, width, 3)
        shapes[f"{prefix}.conv.bias"] = (width,)
        for unit in range(len(config.semantic_dilations)):
            unit_prefix = f"{prefix}.res_units.{unit}"
            shapes[f"{unit_prefix}.conv1.weight"] = (width, width, config.semantic_unit_kernel)
            shapes[f"{unit_prefix}.conv2.weight"] = (width, width, 1)
    return shapes


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Scales that keep activations, and at last the samples, well inside [-1, 1]."""
    values = torch.randn(shape, generator=generator)
    if name.endswith("codebook.embed"):
        return values
    if name.endswith("alpha"):
        return 1.0 + 0.2 * values
    if "norm.weight" in name:
        return 1.0 + 0.1 * values
    if len(shape) == 1:
        return 0.02 * values
    # NOTE: each output of a transposed convolution sums two taps of every input channel.
    fan_in = 2 * shape[0] if ".conv_t1." in name else values[0].numel()
    scaled: Tensor = _gain(name) * fan_in**-0.5 * values
    return scaled


def _gain(name: str) -> float:
    if name == "acoustic_decoder.conv2.weight":
        return 0.05
    if ".project_out." in name:
        return 0.35  # eight of them are added
    return 0.5 if ".res_unit" in name else 1.0


def _acoustic_section(config: HiggsCodecConfig) -> dict[str, Any]:
    return {
        "model_type": "dac",
        "encoder_hidden_size": config.encoder_size,
        "decoder_hidden_size": config.decoder_size,
        "hidden_size": config.acoustic_size,
        "downsampling_ratios": list(config.ratios),
        "upsampling_ratios": list(config.ratios),
        "hop_length": config.hop_length,
    }


def _semantic_section(config: HiggsCodecConfig) -> dict[str, Any]:
    hubert = config.hubert
    return {
        "model_type": "hubert",
        "hidden_size": hubert.hidden_size,
        "num_hidden_layers": hubert.num_hidden_layers,
        "num_attention_heads": hubert.num_attention_heads,
        "intermediate_size": hubert.intermediate_size,
        "layer_norm_eps": hubert.layer_norm_eps,
        "conv_dim": list(hubert.conv_dim),
        "conv_kernel": list(hubert.conv_kernel),
        "conv_stride": list(hubert.conv_stride),
        "num_conv_pos_embeddings": hubert.num_conv_pos_embeddings,
        "num_conv_pos_embedding_groups": hubert.num_conv_pos_embedding_groups,
        "mask_time_prob": 0.0,
    }


def _transformers_config(config: HiggsCodecConfig) -> dict[str, Any]:
    bits_per_second = config.num_codebooks * 10 * config.sample_rate // config.hop_length
    written: dict[str, Any] = {
        "architectures": ["HiggsAudioV2TokenizerModel"],
        "model_type": "higgs_audio_v2_tokenizer",
        "sample_rate": config.sample_rate,
        "semantic_sample_rate": config.semantic_sample_rate,
        "downsample_factor": config.semantic_hop,
        "codebook_size": config.codebook_size,
        "codebook_dim": config.codebook_dim,
        "kernel_size": config.semantic_kernel,
        "unit_kernel_size": config.semantic_unit_kernel,
        "strides": [1] * config.num_semantic_blocks,
        "channel_ratios": [1] * config.num_semantic_blocks,
        "block_dilations": list(config.semantic_dilations),
        "target_bandwidths": [0.5, 1, 1.5, bits_per_second / 1000],
        "acoustic_model_config": _acoustic_section(config),
        "semantic_model_config": _semantic_section(config),
        "dtype": "float32",
    }
    return written | ({"decode_only": True} if config.decode_only else {})


def _boson_config(config: HiggsCodecConfig) -> dict[str, Any]:
    written: dict[str, Any] = {
        "n_filters": 32,
        "D": config.acoustic_size,
        "codebook_dim": config.codebook_dim,
        "target_bandwidths": [0.5, 1, 1.5, 2, 4],
        "ratios": list(config.ratios),
        "sample_rate": config.sample_rate,
        "bins": config.codebook_size,
        "n_q": config.num_codebooks,
        "semantic_techer": "hubert_base_general",
    }
    if config != CODEC_SIZES["full"]:
        written["acoustic_model_config"] = _acoustic_section(config)
        written["semantic_model_config"] = _semantic_section(config)
    return written | ({"decode_only": True} if config.decode_only else {})


def _split_positional(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """HuBERT's positional convolution keeps weight norm in every published file."""
    if name != "semantic_model.encoder.pos_conv_embed.conv.weight":
        return [(name, tensor)]
    length = torch.linalg.vector_norm(tensor, dim=[0, 1], keepdim=True)
    prefix = name.removesuffix("weight") + "parametrizations.weight."
    return [(f"{prefix}original0", length), (f"{prefix}original1", tensor)]


_BOSON_UNIT_PARTS = {"snake1": 0, "conv1": 1, "snake2": 2, "conv2": 3}


def _boson_tensors(name: str, tensor: Tensor, config: HiggsCodecConfig) -> list[tuple[str, Tensor]]:
    key = _boson_key(name, len(config.ratios))
    is_normed = name.startswith("acoustic_") and name.endswith("conv_t1.weight")
    is_normed |= re.match(r"acoustic_.*conv\d\.weight", name) is not None
    if not is_normed:
        return _split_positional(key, tensor)
    length = torch.linalg.vector_norm(tensor, dim=[1, 2], keepdim=True)
    return [(f"{key}_g", length), (f"{key}_v", tensor)]


def _boson_key(name: str, num_blocks: int) -> str:
    """The original's name of a tensor: ``codec_key`` backwards."""
    if name.startswith("quantizer."):
        name = name.replace("quantizer.quantizers.", "quantizer.vq.layers.")
        return name.replace(".codebook.", "._codebook.")
    for ours, theirs in (("fc.", "fc_prior."), ("fc1.", "fc_post1."), ("fc2.", "fc_post2.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    if name.startswith(("encoder_semantic.", "decoder_semantic.")):
        nested = r"(\.conv|\.res_units\.\d+\.conv1|semantic\.conv[12])\.(\w+)$"
        return re.sub(nested, r"\1.conv.\2", name)
    if not name.startswith("acoustic_"):
        return name
    is_encoder = name.startswith("acoustic_encoder.")
    root = "encoder.block" if is_encoder else "decoder_2.model"
    rest = name.split(".", 1)[1]
    found = re.fullmatch(r"block\.(\d+)\.(?:res_unit(\d)\.)?(\w+)\.(\w+)", rest)
    if found is None:
        part, leaf = rest.split(".", 1)
        index = {"conv1": 0, "snake1": num_blocks + 1, "conv2": num_blocks + 2}[part]
        return f"{root}.{index}.{leaf}"
    block, unit, part, leaf = int(found[1]) + 1, found[2], found[3], found[4]
    if unit is not None:
        index = int(unit) - 1 if is_encoder else int(unit) + 1
        return f"{root}.{block}.block.{index}.block.{_BOSON_UNIT_PARTS[part]}.{leaf}"
    index = (3 if is_encoder else 0) + (0 if part == "snake1" else 1)
    return f"{root}.{block}.block.{index}.{leaf}"
