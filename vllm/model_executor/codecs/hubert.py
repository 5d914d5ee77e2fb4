"""HuBERT, the speech network that tells the Higgs codec what is said; inference only.

Knows one clip at a time and nothing of codes. Parameter names are those of the published
checkpoints, so that tensors load by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm.exceptions import CheckpointError

__all__ = ["Hubert", "HubertConfig", "resample"]

_RESAMPLE_WIDTH = 6  # zero crossings of the filter on either side
_RESAMPLE_ROLLOFF = 0.99  # cut-off as a share of the lower Nyquist frequency

# Variants that no published Higgs codec uses: field -> the only value supported.
_FIXED: dict[str, Any] = {
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "hidden_act": "gelu",
    "feat_proj_layer_norm": True,
    "do_stable_layer_norm": False,
    "conv_pos_batch_norm": False,
    "conv_bias": False,
}


@dataclass(frozen=True, kw_only=True)
class HubertConfig:
    """Sizes of one HuBERT; the defaults are the base model."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-5
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> HubertConfig:
        """Read transformers' spelling; fields not given are those of the base model.

        Raises:
            CheckpointError: a variant that is not supported, or sizes that do not fit together.
        """
        for name, wanted in _FIXED.items():
            if raw.get(name, wanted) != wanted:
                raise CheckpointError(
                    f"HuBERT {name}={raw[name]!r} is not supported, only {wanted!r}"
                )
        known = {name: raw[name] for name in cls.__dataclass_fields__ if raw.get(name) is not None}
        for name in ("conv_dim", "conv_kernel", "conv_stride"):
            if name in known:
                known[name] = tuple(known[name])
        config = cls(**known)
        if not len(config.conv_dim) == len(config.conv_kernel) == len(config.conv_stride):
            raise CheckpointError("HuBERT conv_dim, conv_kernel and conv_stride differ in length")
        if config.hidden_size % config.num_attention_heads:
            raise CheckpointError(
                f"HuBERT hidden_size={config.hidden_size} is not a multiple of "
                f"num_attention_heads={config.num_attention_heads}"
            )
        return config


class Hubert(nn.Module):
    """Samples at 16 kHz to the mean of all hidden states, the input's included."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.feature_extractor = _FeatureExtractor(config)
        self.feature_projection = _FeatureProjection(config)
        self.encoder = _Encoder(config)

    def forward(self, samples: Tensor) -> Tensor:
        """Samples [batch, n] to features [batch, frames, hidden], one frame per 320 samples."""
        features = self.feature_extractor(samples[:, None]).transpose(1, 2)
        mean: Tensor = self.encoder(self.feature_projection(features))
        return mean


def resample(samples: Tensor, source_hz: int, target_hz: int) -> Tensor:
    """Band-limited rate conversion of [batch, n] to [batch, ceil(n * target / source)].

    A windowed sinc (Hann, 6 zero crossings, rolloff 0.99), evaluated once per output phase and run
    as a strided convolution; the formula is torchaudio's, with which the codec was trained.
    """
    if source_hz == target_hz:
        return samples
    common = math.gcd(source_hz, target_hz)
    source, target = source_hz // common, target_hz // common
    kernels, width = _resample_kernels(source, target)
    padded = F.pad(samples[:, None], (width, width + source))
    phases = F.conv1d(padded, kernels.to(samples), stride=source)  # [batch, target, steps]
    num_out = -(-samples.shape[-1] * target // source)
    return phases.transpose(1, 2).flatten(1)[:, :num_out]


def _resample_kernels(source: int, target: int) -> tuple[Tensor, int]:
    """Filters [target, 1, taps] for each output phase, and their reach in input samples."""
    cutoff = min(source, target) * _RESAMPLE_ROLLOFF
    width = math.ceil(_RESAMPLE_WIDTH * source / cutoff)
    taps = torch.arange(-width, width + source, dtype=torch.float64) / source
    phases = torch.arange(0, -target, -1, dtype=torch.float64) / target
    time = ((phases[:, None] + taps) * cutoff).clamp(-_RESAMPLE_WIDTH, _RESAMPLE_WIDTH)
    hann = torch.cos(time * (math.pi / _RESAMPLE_WIDTH / 2)) ** 2
    return (torch.sinc(time) * hann * (cutoff / source))[:, None], width


class _FeatureExtractor(nn.Module):
    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        widths = (1, *config.conv_dim)
        self.conv_layers = nn.ModuleList(
            _FeatureConv(widths[i], widths[i + 1], kernel, stride, with_norm=i == 0)
            for i, (kernel, stride) in enumerate(
                zip(config.conv_kernel, config.conv_stride, strict=True)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.conv_layers:
            x = layer(x)
        return x


class _FeatureConv(nn.Module):
    def __init__(
        self, in_width: int, out_width: int, kernel: int, stride: int, *, with_norm: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_width, out_width, kernel, stride, bias=False)
        self.layer_norm = nn.GroupNorm(out_width, out_width) if with_norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return F.gelu(x)


class _FeatureProjection(nn.Module):
    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.projection(self.layer_norm(x))
        return projected


class _Encoder(nn.Module):
    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.pos_conv_embed = _PositionalConv(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(_EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Mean over the input of the first layer and the output of every layer."""
        x = self.layer_norm(x + self.pos_conv_embed(x))
        total = x.clone()
        for layer in self.layers:
            x = layer(x)
            total += x
        return total / (len(self.layers) + 1)


class _PositionalConv(nn.Module):
    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        width, kernel = config.hidden_size, config.num_conv_pos_embeddings
        groups = config.num_conv_pos_embedding_groups
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        num_frames = x.shape[1]  # an even kernel yields one output too many
        return F.gelu(self.conv(x.transpose(1, 2))[..., :num_frames]).transpose(1, 2)


class _EncoderLayer(nn.Module):
    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = _FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(x + self.attention(x))
        normed: Tensor = self.final_layer_norm(x + self.feed_forward(x))
        return normed


class _Attention(nn.Module):
    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.get_submodule(name)(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        out: Tensor = self.get_submodule("out_proj")(mixed)
        return out


class _FeedForward(nn.Module):
    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output_dense(F.gelu(self.intermediate_dense(x)))
        return out
