"""The codec's encoder as it is trained: samples to the vectors that are quantized.

In the shape of Higgs Audio v2's, with the published names: an acoustic encoder, a HuBERT, a semantic
encoder, and a layer that mixes both. Sizes are such that HuBERT's first three layers can be set
instead of learnt: a filter bank whose bands know their loudness on a logarithmic scale, as the
features of ``features.py`` do.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.decoder import KERNEL, RATIOS, ResidualUnits, Snake, norm_conv
from vllm.checkpoints.make_codec import CODEC_SIZES
from vllm.model_executor.codecs.higgs import HiggsCodec, HiggsCodecConfig
from vllm.model_executor.codecs.hubert import HubertConfig, resample

__all__ = ["Encoder", "codec_config", "stage_inputs"]

_RATE = 16000
_WINDOW, _HOP = 480, 160  # samples at 16 kHz: four filtered steps of 10 ms for each codec frame
_PER_FRAME = 4
_PADDING = 160  # that the engine puts on either side of a clip for HuBERT
_NUM_BINS = _WINDOW // 2 - 1
_NUM_PHASES = 4
_NARROW_HZ, _NUM_WIDE = 1000.0, 45  # single bins below, bands on the mel scale above
_THRESHOLDS = 8
_SOFTEST, _LOUDEST = 3e-5, 0.1  # amplitude of a sine, full scale being 1
_SHARPNESS = 3.0

# A filter's output is far below the epsilon of the group norm behind it, which then only scales by
# its inverse root: loudness is not taken out, and a clip's frames do not depend on its length.
_QUIET = 1e-2
_EPSILON = 1e-5
_GAIN = 3e4
_CARRIED = 10.0  # value of the channel that stands for a bias, which these layers have not


def codec_config(size: int, decoder_width: int) -> HiggsCodecConfig:
    """Configuration of a codec with this encoder; ``size`` is that of codes and decoder input."""
    num_bands = len(_bands())
    hubert = HubertConfig(
        hidden_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=480,
        conv_dim=(_NUM_PHASES * _NUM_BINS + 1, num_bands + 1, num_bands * _THRESHOLDS + 1, 256),
        conv_kernel=(_WINDOW, 1, 1, _PER_FRAME),
        conv_stride=(_HOP, 1, 1, _PER_FRAME),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=16,
    )
    return replace(
        CODEC_SIZES["tiny"],
        codebook_dim=size,
        acoustic_size=size,
        encoder_size=8,
        decoder_size=decoder_width,
        semantic_hop=_HOP * _PER_FRAME,
        num_semantic_blocks=1,
        hubert=hubert,
    )


class _Block(ResidualUnits):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__(channels)
        self.snake1 = Snake(channels)
        conv = nn.Conv1d(channels, 2 * channels, 2 * stride, stride, math.ceil(stride / 2))
        self.conv1 = nn.utils.parametrizations.weight_norm(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.snake1(super().forward(x)))


class _AcousticEncoder(nn.Module):
    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.conv1 = norm_conv(1, width, KERNEL)
        self.block = nn.ModuleList(_Block(width << at, ratio) for at, ratio in enumerate(RATIOS))
        wide = width << len(RATIOS)
        self.snake1 = Snake(wide)
        self.conv2 = norm_conv(wide, size, 3)

    def forward(self, samples: Tensor) -> Tensor:
        """[B, n] -> [B, size, n / 960]."""
        x = self.conv1(samples[:, None])
        for block in self.block:
            x = block(x)
        return self.conv2(self.snake1(x))


class Encoder(nn.Module):
    """Samples [B, n] to vectors [B, n / 960, quantizer size].

    The first ``size`` channels of these are the sound, the next say which phoneme it is: see
    ``stage_inputs``.
    """

    def __init__(self, size: int, spread: Tensor | None = None) -> None:
        """``spread`` [size]: standard deviation of the wanted vectors, to begin with."""
        super().__init__()
        self.config = codec_config(size, 192)
        engine = HiggsCodec(self.config)
        self.acoustic_encoder = _AcousticEncoder(self.config.encoder_size, size)
        self.semantic_model = engine.semantic_model
        self.encoder_semantic = engine.encoder_semantic
        self.fc = engine.fc
        with torch.no_grad():
            self._set_filters()
            if spread is not None:
                self.fc.weight[:size] *= spread[:, None]
                self.fc.weight[size : 2 * size] *= spread[:, None]

    def forward(self, samples: Tensor) -> Tensor:
        narrow = resample(samples, self.config.sample_rate, self.config.semantic_sample_rate)
        padded = F.pad(narrow, (_PADDING, _PADDING))
        hidden = self.semantic_model(padded).transpose(1, 2)
        features = [self.acoustic_encoder(samples), self.encoder_semantic(hidden)]
        return self.fc(torch.cat(features, 1).transpose(1, 2))

    def _set_filters(self) -> None:
        filters, bands, steps = list(self.semantic_model.feature_extractor.conv_layers)[:3]
        filters.conv.weight.copy_(_filter_weights())
        norm = filters.layer_norm
        norm.weight.fill_(_GAIN / _QUIET * _EPSILON**0.5)
        norm.weight[-1] = 0
        norm.bias.zero_()
        norm.bias[-1] = _CARRIED
        bands.conv.weight.copy_(_band_weights())
        steps.conv.weight.copy_(_step_weights())
        for layer in (filters, bands, steps):
            layer.requires_grad_(False)


def stage_inputs(vectors: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """What the first quantizer looks at and what the others do, [..., size] each."""
    sound = vectors[..., :size]
    return sound + vectors[..., size : 2 * size], sound


def _filter_weights() -> Tensor:
    """[channels, 1, window]: sines of every bin in four phases, and one channel of nothing."""
    places = torch.arange(_WINDOW, dtype=torch.float64) - (_WINDOW - 1) / 2
    # The middle of the window that the features have, 1024 samples at 24 kHz.
    window = torch.cos(math.pi * places / (1024 * 2 / 3)).square()
    window *= 2 / window.sum()  # a sine of amplitude 1 gives one of amplitude 1
    bins = torch.arange(1, _NUM_BINS + 1)[:, None, None]
    turns = torch.arange(_NUM_PHASES)[None, :, None] / _NUM_PHASES
    waves = torch.cos(2 * math.pi * (bins * places / _WINDOW + turns)) * window * _QUIET
    nothing = torch.zeros(1, _WINDOW, dtype=torch.float64)
    return torch.cat([waves.flatten(0, 1), nothing])[:, None].float()


def _bands() -> Tensor:
    """Weights of the bins in each band, [num_bands, num_bins]; each row has the sum 1."""
    hz = torch.arange(1, _NUM_BINS + 1) * _RATE / _WINDOW
    narrow = torch.eye(_NUM_BINS)[hz <= _NARROW_HZ]
    low, high = (2595 * math.log10(1 + top / 700) for top in (_NARROW_HZ, _RATE / 2))
    edges = 700 * (10 ** (torch.linspace(low, high, _NUM_WIDE + 2) / 2595) - 1)
    rising = (hz - edges[:-2, None]) / edges.diff()[:-1, None]
    falling = (edges[2:, None] - hz) / edges.diff()[1:, None]
    wide = rising.minimum(falling).clamp(min=0)
    return torch.cat([narrow, wide / wide.sum(1, keepdim=True)])


def _band_weights() -> Tensor:
    """[bands + 1, channels, 1]: loudness of a band, which is the mean over phases of half waves."""
    # Of a turning pointer of length 1, half waves in four phases add up to 4 / pi on average.
    mixed = _bands().repeat_interleave(_NUM_PHASES, 1) * (math.pi / 4)
    return _with_carried(mixed)


def _step_weights() -> Tensor:
    """[bands * thresholds + 1, bands + 1, 1]: how far each band is below each threshold."""
    thresholds = torch.logspace(math.log10(_SOFTEST), math.log10(_LOUDEST), _THRESHOLDS) * _GAIN
    num_bands = len(_bands())
    below = torch.zeros(num_bands, _THRESHOLDS, num_bands)
    for band in range(num_bands):
        below[band, :, band] = -_SHARPNESS / thresholds
    weights = _with_carried(below.flatten(0, 1))
    weights[:-1, -1] = _SHARPNESS / _CARRIED
    weights[-1, -1] = 1 / _CARRIED
    return weights


def _with_carried(weights: Tensor) -> Tensor:
    """Add an input and an output channel for the bias, the one a copy of the other."""
    widened = F.pad(weights, (0, 1, 0, 1))
    widened[-1, -1] = 1.0
    return widened[..., None]
