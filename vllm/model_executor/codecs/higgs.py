"""The Higgs Audio v2 codec: eight codes per frame to samples, and clips to codes.

Knows the sizes that its two checkpoint layouts state, and nothing of streaming. Formulas are those
of ``HiggsAudioV2TokenizerModel`` in ``transformers``, which tests compare with.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm.exceptions import CheckpointError, InvalidRequestError
from vllm.kernels import native
from vllm.kernels.pair_wave_decoder import PairWaveDecoder, can_decode_in_pairs
from vllm.kernels.wave_decoder import WaveDecoder, WaveLayer
from vllm.logger import get_logger
from vllm.model_executor.codecs.higgs_tensors import fold_weight_norm, named_tensors
from vllm.model_executor.codecs.hubert import Hubert, HubertConfig, resample
from vllm.model_executor.codecs.interface import Codec
from vllm.model_executor.weights import iter_tensors, load_strict, read_config

__all__ = ["HiggsCodec", "HiggsCodecConfig"]

logger = get_logger(__name__)

_KERNEL = 7
_DILATIONS = (1, 3, 9)
_SEMANTIC_PADDING = 160  # zeros on either side of a clip before HuBERT, as trained
_SNAKE_EPS = 1e-9


@dataclass(frozen=True, kw_only=True)
class HiggsCodecConfig:
    """Sizes of one codec, whichever layout stated them; the defaults are the published codec."""

    sample_rate: int = 24000
    semantic_sample_rate: int = 16000
    semantic_hop: int = 320  # HuBERT's, in samples at its own rate
    num_codebooks: int = 8
    codebook_size: int = 1024
    codebook_dim: int = 64
    acoustic_size: int = 256  # channels between quantizer and decoder
    encoder_size: int = 64
    decoder_size: int = 1024
    ratios: tuple[int, ...] = (8, 5, 4, 2, 3)
    semantic_kernel: int = 3
    semantic_unit_kernel: int = 3
    semantic_dilations: tuple[int, ...] = (1, 1)
    num_semantic_blocks: int = 2
    hubert: HubertConfig = field(default_factory=HubertConfig)
    decode_only: bool = False

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.ratios)

    @property
    def quantizer_size(self) -> int:
        """Channels that are quantized: acoustic and semantic features, one after the other."""
        return self.acoustic_size + self.hubert.hidden_size

    @property
    def semantic_decimation(self) -> int:
        """HuBERT frames per codec frame."""
        hop = self.hop_length * self.semantic_sample_rate // self.sample_rate
        return hop // self.semantic_hop

    @property
    def context_frames(self) -> int:
        """Frames on either side that one frame's samples depend on, from the layers' reach."""
        low, high = -(_KERNEL // 2), self.hop_length - 1 + _KERNEL // 2
        reach = sum(_DILATIONS) * (_KERNEL // 2)
        for stride in reversed(self.ratios):
            shift = math.ceil(stride / 2)
            low = -((2 * stride - 1 - shift - (low - reach)) // stride)
            high = (high + reach + shift) // stride
        return max(_KERNEL // 2 - low, high + _KERNEL // 2)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> HiggsCodecConfig:
        """Read either layout: the original flat file, or transformers' nested one.

        A file of the original layout may carry transformers' two nested sections as well, for
        sizes that the original leaves to its code.

        Raises:
            CheckpointError: a field is missing or has a value that is not supported.
        """
        is_boson = "n_q" in raw
        acoustic = _section(raw, "acoustic_model_config")
        ratios = tuple(raw["ratios"] if is_boson else acoustic.get("upsampling_ratios", ()))
        config = cls(
            sample_rate=raw.get("sample_rate", 24000),
            semantic_sample_rate=raw.get("semantic_sample_rate", 16000),
            semantic_hop=raw.get("downsample_factor", 320),
            num_codebooks=raw["n_q"] if is_boson else _num_codebooks(raw, ratios),
            codebook_size=raw.get("bins" if is_boson else "codebook_size", 1024),
            codebook_dim=raw.get("codebook_dim", 64),
            acoustic_size=raw["D"] if is_boson else acoustic.get("hidden_size", 256),
            encoder_size=acoustic.get("encoder_hidden_size", 64),
            decoder_size=acoustic.get("decoder_hidden_size", 1024),
            ratios=ratios,
            semantic_kernel=raw.get("kernel_size", 3),
            semantic_unit_kernel=raw.get("unit_kernel_size", 3),
            semantic_dilations=tuple(raw.get("block_dilations", (1, 1))),
            num_semantic_blocks=len(raw.get("strides", (1, 1))),
            hubert=HubertConfig.from_dict(_section(raw, "semantic_model_config")),
            decode_only=bool(raw.get("decode_only", False)),
        )
        config._check(raw, acoustic)
        return config

    def _check(self, raw: Mapping[str, Any], acoustic: Mapping[str, Any]) -> None:
        if tuple(acoustic.get("downsampling_ratios", self.ratios)) != self.ratios:
            raise CheckpointError(
                f"codec downsampling_ratios={acoustic['downsampling_ratios']} must equal "
                f"upsampling_ratios={list(self.ratios)}"
            )
        for name in ("strides", "channel_ratios"):
            if any(value != 1 for value in raw.get(name, ())):
                raise CheckpointError(f"codec {name}={raw[name]!r} is not supported, only ones")
        if self.decoder_size % 2 ** len(self.ratios):
            raise CheckpointError(
                f"codec decoder_hidden_size={self.decoder_size} must be a multiple of "
                f"{2 ** len(self.ratios)}"
            )
        step = self.semantic_hop * self.sample_rate
        if not self.decode_only and self.hop_length * self.semantic_sample_rate % step:
            raise CheckpointError(
                f"codec hop of {self.hop_length} samples at {self.sample_rate} Hz is no whole "
                f"number of semantic frames ({self.semantic_hop} at {self.semantic_sample_rate} Hz)"
            )


class HiggsCodec(Codec):
    """The network. Parameter names are transformers' key names; weight norm is folded."""

    def __init__(self, config: HiggsCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.sample_rate = config.sample_rate
        self.hop_length = config.hop_length
        self.num_codebooks = config.num_codebooks
        self.codebook_size = config.codebook_size
        self.context_frames = config.context_frames
        self.can_encode = not config.decode_only
        self.fingerprint = ""
        self._wave_decoder: WaveDecoder | None = None  # on a CPU
        self._pair_decoder: PairWaveDecoder | None = None  # on CUDA
        self.quantizer = _Quantizer(config)
        self.fc2 = nn.Linear(config.quantizer_size, config.acoustic_size)
        self.acoustic_decoder = _Decoder(config)
        if self.can_encode:
            self.acoustic_encoder = _AcousticEncoder(config)
            self.semantic_model = Hubert(config.hubert)
            self.encoder_semantic = _SemanticEncoder(config)
            self.fc = nn.Linear(config.quantizer_size, config.quantizer_size)
        num_rows = config.num_codebooks * config.codebook_size
        self.table: Tensor  # [K * codebook_size, acoustic_size]
        self.table_bias: Tensor  # [acoustic_size]
        self.row_offsets: Tensor  # [K, 1], first row of each codebook
        self.register_buffer("table", torch.empty(num_rows, config.acoustic_size), persistent=False)
        self.register_buffer("table_bias", torch.empty(config.acoustic_size), persistent=False)
        offsets = torch.arange(0, num_rows, config.codebook_size)[:, None]
        self.register_buffer("row_offsets", offsets, persistent=False)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        uses_kernels: bool = True,
    ) -> HiggsCodec:
        """Load a checkpoint of either layout; raises CheckpointError naming every bad tensor."""
        config = HiggsCodecConfig.from_dict(read_config(folder))
        with torch.device("meta"):
            codec = cls(config)
        codec.to_empty(device="cpu")
        codec.row_offsets.copy_(torch.arange(config.num_codebooks)[:, None] * config.codebook_size)
        tensors = named_tensors(
            iter_tensors(folder),
            num_blocks=len(config.ratios),
            decode_only=config.decode_only,
            source=str(folder),
        )
        load_strict(codec.state_dict(), fold_weight_norm(tensors), source=str(folder))
        codec.finish_loading()
        codec.to(device=device, dtype=dtype).eval().requires_grad_(False)
        if uses_kernels and dtype == torch.float32:
            codec._pack_decoder()
        return codec

    @torch.no_grad()
    def finish_loading(self) -> None:
        """Derive what decoding runs on from the loaded weights.

        Codebook, ``project_out`` and ``fc2`` are linear in a row, so they fold into one table per
        codebook and one bias; sums are made in float64 and rounded once.
        """
        size = self.codebook_size
        fc2 = self.fc2.weight.double()
        bias = self.fc2.bias.double()
        for index, quantizer in enumerate(self.quantizer.stages()):
            projection = fc2 @ quantizer.project_out.weight.double()
            rows = quantizer.codebook.embed.double() @ projection.T
            self.table[index * size : (index + 1) * size] = rows
            bias = bias + fc2 @ quantizer.project_out.bias.double()
        self.table_bias.copy_(bias)
        for module in self.modules():
            if isinstance(module, _Snake):
                module.finish_loading()
        decoding = {"table": self.table, "table_bias": self.table_bias}
        decoding |= self.acoustic_decoder.state_dict()
        codebooks = self.quantizer.state_dict()
        sizes = [self.sample_rate, self.hop_length, self.num_codebooks, self.codebook_size]
        self.fingerprint = _digest(sizes, decoding | _only(codebooks, ("embed", "project_out")))

    def _pack_decoder(self) -> None:
        """Hold the decoder for the device's own kernels as well, where there are such."""
        layers = list(self.acoustic_decoder.layers())
        chain = (self.table, self.table_bias, self.num_codebooks, layers)
        if can_decode_in_pairs(self.table.device):
            try:
                pair_decoder = PairWaveDecoder(*chain)
                pair_decoder.build()
            except Exception as error:
                # Of any kind: a compiler's, a driver's, or a chain that is no such decoder.
                logger.warning("torch decodes the codec's frames, not our kernels: %s", error)
            else:
                self._pair_decoder = pair_decoder
        if self.table.device.type != "cpu" or native.loaded_library() is None:
            return
        try:
            self._wave_decoder = WaveDecoder(*chain)
        except ValueError as error:
            logger.warning("torch decodes the codec's frames, not the native library: %s", error)

    @cached_property
    def encoder_fingerprint(self) -> str:
        """Hash of every weight and size; made on first use, as the encoder is large."""
        return _digest(asdict(self.config), self.state_dict())

    def decode(self, codes: Tensor) -> Tensor:
        return self.decode_part(codes, 0, codes.shape[-1])

    def decode_part(self, codes: Tensor, first: int, last: int) -> Tensor:
        wave_decoder, on_cpu = self._wave_decoder, codes.device.type == "cpu"
        if wave_decoder is not None and native.loaded_library() is not None and on_cpu:
            return torch.stack([wave_decoder(each, first, last) for each in codes])
        pair_decoder = self._pair_decoder
        if pair_decoder is not None and codes.device == pair_decoder.device:
            return pair_decoder(codes, first, last)
        samples = self._decode_with_torch(codes)
        return samples[:, first * self.hop_length : last * self.hop_length]

    def _decode_with_torch(self, codes: Tensor) -> Tensor:
        rows = codes + self.row_offsets  # [batch, K, T]
        features = F.embedding(rows, self.table).sum(dim=1) + self.table_bias  # [batch, T, C]
        samples: Tensor = self.acoustic_decoder(features.transpose(1, 2))
        return samples[:, 0].float().clamp_(-1.0, 1.0)

    def encode(self, samples: Tensor) -> Tensor:
        if not self.can_encode:
            raise InvalidRequestError(
                "ref_audio cannot be used: this server's codec decodes only; choose one of its "
                "voices or serve a codec with an encoder",
                param="ref_audio",
            )
        num_samples = samples.shape[-1]
        if num_samples == 0 or num_samples % self.hop_length:
            raise InvalidRequestError(
                f"a clip of {num_samples} samples is no positive multiple of {self.hop_length}",
                param="ref_audio",
            )
        samples = samples.to(self.table.dtype)
        acoustic = self.acoustic_encoder(samples[:, None])
        features = torch.cat((acoustic, self._semantic_features(samples)), dim=1)
        return self.quantizer.encode(self.fc(features.transpose(1, 2)))

    def _semantic_features(self, samples: Tensor) -> Tensor:
        """What is said: [batch, n] to [batch, semantic size, num_frames]."""
        config = self.config
        narrow = resample(samples, config.sample_rate, config.semantic_sample_rate)
        hidden = self.semantic_model(F.pad(narrow, (_SEMANTIC_PADDING, _SEMANTIC_PADDING)))
        features: Tensor = self.encoder_semantic(
            hidden[:, :: config.semantic_decimation].transpose(1, 2)
        )
        return features


class _Snake(nn.Module):
    """``x + sin(alpha * x) ** 2 / (alpha + 1e-9)``, one alpha per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))  # [1, channels, 1]
        self.inverse: Tensor  # [1, channels, 1]
        self.register_buffer("inverse", torch.empty(1, channels, 1), persistent=False)

    def finish_loading(self) -> None:
        self.inverse.copy_((self.alpha + _SNAKE_EPS).reciprocal())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Alpha and its inverse, each [channels]."""
        return self.alpha.flatten(), self.inverse.flatten()

    def forward(self, x: Tensor, *, in_place: bool = False) -> Tensor:
        wave = (x * self.alpha).sin_().square_()
        if in_place:
            return x.addcmul_(wave, self.inverse)
        return torch.addcmul(x, wave, self.inverse)


class _ResidualUnit(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        padding = dilation * (_KERNEL // 2)
        self.snake1 = _Snake(channels)
        self.conv1 = nn.Conv1d(channels, channels, _KERNEL, padding=padding, dilation=dilation)
        self.snake2 = _Snake(channels)
        self.conv2 = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.snake2(self.conv1(self.snake1(x)), in_place=True)
        out: Tensor = self.conv2(hidden)
        return out.add_(x)

    def layers(self) -> Iterator[WaveLayer]:
        dilation = self.conv1.dilation[0]
        yield _wave_layer(self.conv1, dilation=dilation, snake=self.snake1.factors())
        yield _wave_layer(self.conv2, snake=self.snake2.factors(), is_residual=True)


class _ResidualUnits(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res_unit1, self.res_unit2, self.res_unit3 = (
            _ResidualUnit(channels, dilation) for dilation in _DILATIONS
        )

    def residuals(self, x: Tensor) -> Tensor:
        out: Tensor = self.res_unit3(self.res_unit2(self.res_unit1(x)))
        return out


class _DecoderBlock(_ResidualUnits):
    def __init__(self, in_channels: int, stride: int) -> None:
        super().__init__(in_channels // 2)
        self.snake1 = _Snake(in_channels)
        self.conv_t1 = nn.ConvTranspose1d(
            in_channels,
            in_channels // 2,
            2 * stride,
            stride,
            padding=math.ceil(stride / 2),
            output_padding=stride % 2,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.residuals(self.conv_t1(self.snake1(x, in_place=True)))

    def layers(self) -> Iterator[WaveLayer]:
        upsampling = self.conv_t1.stride[0]
        yield _wave_layer(self.conv_t1, upsampling=upsampling, snake=self.snake1.factors())
        for unit in (self.res_unit1, self.res_unit2, self.res_unit3):
            yield from unit.layers()


class _Decoder(nn.Module):
    def __init__(self, config: HiggsCodecConfig) -> None:
        super().__init__()
        width = config.decoder_size
        self.conv1 = nn.Conv1d(config.acoustic_size, width, _KERNEL, padding=_KERNEL // 2)
        self.block = nn.ModuleList(
            _DecoderBlock(width >> index, stride) for index, stride in enumerate(config.ratios)
        )
        width >>= len(config.ratios)
        self.snake1 = _Snake(width)
        self.conv2 = nn.Conv1d(width, 1, _KERNEL, padding=_KERNEL // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Features [batch, acoustic_size, T] to samples [batch, 1, T * hop], not clamped."""
        x = self.conv1(x)
        for block in self.block:
            x = block(x)
        samples: Tensor = self.conv2(self.snake1(x, in_place=True))
        return samples

    def layers(self) -> Iterator[WaveLayer]:
        """The same as a chain for the native library."""
        yield _wave_layer(self.conv1)
        for block in self.block:
            assert isinstance(block, _DecoderBlock)
            yield from block.layers()
        yield _wave_layer(self.conv2, snake=self.snake1.factors())


def _wave_layer(conv: nn.Conv1d | nn.ConvTranspose1d, **options: Any) -> WaveLayer:
    assert conv.bias is not None
    return WaveLayer(conv.weight, conv.bias, **options)


class _EncoderBlock(_ResidualUnits):
    def __init__(self, in_channels: int, stride: int) -> None:
        super().__init__(in_channels)
        self.snake1 = _Snake(in_channels)
        padding = math.ceil(stride / 2)
        self.conv1 = nn.Conv1d(in_channels, 2 * in_channels, 2 * stride, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv1(self.snake1(self.residuals(x), in_place=True))
        return out


class _AcousticEncoder(nn.Module):
    def __init__(self, config: HiggsCodecConfig) -> None:
        super().__init__()
        width = config.encoder_size
        self.conv1 = nn.Conv1d(1, width, _KERNEL, padding=_KERNEL // 2)
        self.block = nn.ModuleList(
            _EncoderBlock(width << index, stride) for index, stride in enumerate(config.ratios)
        )
        width <<= len(config.ratios)
        self.snake1 = _Snake(width)
        self.conv2 = nn.Conv1d(width, config.acoustic_size, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Samples [batch, 1, n] to features [batch, acoustic_size, n / hop]."""
        x = self.conv1(x)
        for block in self.block:
            x = block(x)
        features: Tensor = self.conv2(self.snake1(x, in_place=True))
        return features


class _SemanticUnit(nn.Module):
    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        padding = (kernel - 1) // 2 * dilation
        self.conv1 = nn.Conv1d(width, width, kernel, padding=padding, dilation=dilation, bias=False)
        self.conv2 = nn.Conv1d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.conv2(F.elu(self.conv1(F.elu(x)), inplace=True))
        return hidden.add_(x)


class _SemanticBlock(nn.Module):
    def __init__(self, config: HiggsCodecConfig) -> None:
        super().__init__()
        width, kernel = config.hubert.hidden_size, config.semantic_unit_kernel
        self.res_units = nn.ModuleList(
            _SemanticUnit(width, kernel, dilation) for dilation in config.semantic_dilations
        )
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.res_units:
            x = unit(x)
        out: Tensor = self.conv(x)
        return out


class _SemanticEncoder(nn.Module):
    def __init__(self, config: HiggsCodecConfig) -> None:
        super().__init__()
        width, kernel = config.hubert.hidden_size, config.semantic_kernel
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, bias=False)
        self.conv_blocks = nn.ModuleList(
            _SemanticBlock(config) for _ in range(config.num_semantic_blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for block in self.conv_blocks:
            x = block(x)
        return x


class _Codebook(nn.Module):
    def __init__(self, config: HiggsCodecConfig) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.empty(config.codebook_size, config.codebook_dim))


class _QuantizerStage(nn.Module):
    def __init__(self, config: HiggsCodecConfig) -> None:
        super().__init__()
        self.codebook = _Codebook(config)
        self.project_out = nn.Linear(config.codebook_dim, config.quantizer_size)
        if not config.decode_only:
            self.project_in = nn.Linear(config.quantizer_size, config.codebook_dim)

    def nearest(self, residual: Tensor) -> Tensor:
        """Index of the nearest row for each vector: [batch, T, C] to [batch, T]."""
        point = self.project_in(residual)
        embed = self.codebook.embed
        indices: Tensor = (2 * point @ embed.T - embed.square().sum(dim=1)).argmax(dim=-1)
        return indices

    def reconstruct(self, indices: Tensor) -> Tensor:
        vectors: Tensor = self.project_out(F.embedding(indices, self.codebook.embed))
        return vectors


class _Quantizer(nn.Module):
    def __init__(self, config: HiggsCodecConfig) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(
            _QuantizerStage(config) for _ in range(config.num_codebooks)
        )

    def stages(self) -> Iterator[_QuantizerStage]:
        for stage in self.quantizers:
            assert isinstance(stage, _QuantizerStage)
            yield stage

    def encode(self, vectors: Tensor) -> Tensor:
        """Each stage quantizes what the ones before left over: [batch, T, C] to [batch, K, T]."""
        codes = []
        for stage in self.stages():
            codes.append(stage.nearest(vectors))
            vectors = vectors - stage.reconstruct(codes[-1])
        return torch.stack(codes, dim=1)


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = raw.get(name) or {}
    if not isinstance(section, Mapping):
        raise CheckpointError(f"codec {name} must be an object, not {section!r}")
    return section


def _num_codebooks(raw: Mapping[str, Any], ratios: Sequence[int]) -> int:
    """Codebooks that the largest bandwidth pays for, in kbit/s."""
    bandwidths = raw.get("target_bandwidths")
    if not ratios or not bandwidths:
        raise CheckpointError(
            "codec configuration lacks acoustic_model_config.upsampling_ratios or target_bandwidths"
        )
    frame_rate = math.ceil(raw.get("sample_rate", 24000) / math.prod(ratios))
    bits_per_code = math.ceil(math.log2(raw.get("codebook_size", 1024)))
    return int(1000 * bandwidths[-1] // (frame_rate * bits_per_code))


def _only(state: Mapping[str, Tensor], parts: Sequence[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if any(p in name for p in parts)}


def _digest(sizes: object, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(json.dumps(sizes, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
