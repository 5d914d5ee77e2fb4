"""Codes to samples on CUDA, in products of pairs of bfloat16 that are nearly those of float32.

The Python face of ``triton/pair_wave_decoder.py``, for the chains of convolutions that
``wave_decoder`` takes. The reference in torch is the codec's own module; nothing here knows a
codec's name or a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod

import torch
from torch import Tensor

from vllm.kernels.conv_config import CHANNEL_QUANTUM, ConvConfig, find_conv_config
from vllm.kernels.wave_decoder import WaveLayer
from vllm.kernels.wave_rows import LayerSpan, plan_rows

__all__ = ["PairWaveDecoder", "can_decode_in_pairs"]

_MIN_ARCH = 80  # from here on tensor cores take bfloat16
_MAX_VALUES = 2**31  # of one window in one layer, which kernels count in int32

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class _Conv:
    """A layer as ``triton.pair_wave_decoder.convolve`` takes it."""

    weight: Pair
    bias: Tensor
    snake: tuple[Tensor, Tensor] | None  # the next layer's, for its results
    span: LayerSpan
    width: int  # of a row of the result
    adds_plain: bool
    keeps_plain: bool
    config: ConvConfig


def can_decode_in_pairs(device: torch.device) -> bool:
    """Whether the kernels are for this device, and Triton is there to build them."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return _arch_of(device) >= _MIN_ARCH


class PairWaveDecoder:
    """Packed copies of the layers, every weight split in two.

    A window's samples have the same bits alone and beside others, and asked for in part or whole.

    Args:
        table: float32 [num_codebooks * codebook_size, width]; the sum of one row per codebook and
            of the bias goes into the first layer.
        table_bias: float32 [width].
        num_codebooks: K.
        layers: as of ``wave_decoder.WaveDecoder``, float32 on the device of the table.
        arch: compute capability whose configurations are taken, 90 for 9.0; None asks the device.

    Raises:
        ValueError: the layers are no such chain.
    """

    def __init__(
        self,
        table: Tensor,
        table_bias: Tensor,
        num_codebooks: int,
        layers: Sequence[WaveLayer],
        *,
        arch: int | None = None,
    ) -> None:
        from vllm.kernels.triton import pair_wave_decoder as kernels

        _check_chain(layers, table.shape[1])
        self._kernels = kernels
        self._table = table.detach().contiguous()
        self._table_bias = table_bias.detach().contiguous()
        self._num_codebooks = num_codebooks
        arch = _arch_of(table.device) if arch is None else arch
        self._convs = [_pack(layers, index, arch) for index in range(len(layers) - 1)]
        last = layers[-1]
        self._last_weight = _padded(last.weight.detach()[0].t(), 1).contiguous()  # [taps, inputs]
        self._last_bias = last.bias.detach().contiguous()
        self._spans = [LayerSpan.of(layer) for layer in layers]
        self._hop_length = prod(span.phases for span in self._spans)

    @property
    def device(self) -> torch.device:
        """Where codes have to be."""
        return self._table.device

    def build(self) -> None:
        """Have Triton build all kernels now, which takes it a minute when its cache is empty."""
        shape = (1, self._num_codebooks, 1)
        self(torch.zeros(shape, dtype=torch.int64, device=self.device))

    def __call__(
        self, codes: Tensor, first_frame: int = 0, last_frame: int | None = None
    ) -> Tensor:
        """Samples of frames ``first_frame .. last_frame - 1``, by default all.

        Frames beyond are context, of which each layer computes what these samples depend on.

        Args:
            codes: [batch, K, num_frames], every one below the codebook's size.

        Returns:
            float32 [batch, (last_frame - first_frame) * hop_length], from -1 to 1.
        """
        batch, num_codebooks, num_frames = codes.shape
        last_frame = num_frames if last_frame is None else last_frame
        assert num_codebooks == self._num_codebooks
        assert 0 <= first_frame <= last_frame <= num_frames
        num_samples = (last_frame - first_frame) * self._hop_length
        samples = torch.empty(batch, num_samples, device=self.device)
        if not samples.numel():
            return samples
        parts = plan_rows(self._spans, num_frames, first_frame, last_frame)
        x = self._sum_codes(codes, parts[0].inputs)
        plain: Tensor | None = None
        for index, (conv, part) in enumerate(zip(self._convs, parts[:-1], strict=True)):
            out = self._new_pair(batch, part.outputs, conv.width)
            if conv.adds_plain:
                assert plain is not None  # of all rows that the layer before takes
                first = part.outputs.start - parts[index - 1].inputs.start
                plain = plain[:, first : first + len(part.outputs)]
            elif conv.keeps_plain:
                plain = torch.empty_like(out[0], dtype=torch.float32)
            self._kernels.convolve(
                *(x, conv.weight, conv.bias, conv.snake),
                plain if conv.adds_plain else None,
                out,
                plain if conv.keeps_plain else None,
                conv.config,
                dilation=conv.span.dilation,
                num_steps=len(part.steps),
                first_row=part.first_row,
                shift=part.shift,
            )
            x = out
        self._kernels.convolve_to_samples(
            *(x, self._last_weight, self._last_bias, samples),
            dilation=self._spans[-1].dilation,
            first_row=parts[-1].first_row,
        )
        return samples

    def _sum_codes(self, codes: Tensor, frames: range) -> Pair:
        x = self._new_pair(len(codes), frames, _round_up(self._table.shape[1]))
        table, bias = self._table, self._table_bias
        self._kernels.sum_codes(codes.contiguous(), table, bias, x, first_frame=frames.start)
        return x

    def _new_pair(self, batch: int, rows: range, width: int) -> Pair:
        num_rows = len(rows)
        assert num_rows * width < _MAX_VALUES, f"a window of {num_rows} rows is too long"
        both = torch.empty(2, batch, num_rows, width, dtype=torch.bfloat16, device=self.device)
        return both[0], both[1]


def _check_chain(layers: Sequence[WaveLayer], width: int) -> None:
    """ValueError unless every layer takes what the one before gives, and the last gives samples."""
    for index, layer in enumerate(layers):
        num_outputs, num_inputs, kernel_size = _shape_of(layer)
        right_kernel = 2 * layer.upsampling if layer.upsampling else kernel_size | 1
        if num_inputs != width or kernel_size != right_kernel:
            raise ValueError(f"layer {index} of {tuple(layer.weight.shape)} is no link of a chain")
        if layer.is_residual and not _has_residual(layers, index):
            raise ValueError(f"layer {index} has nothing to add to its result")
        width = num_outputs
    if not layers or layers[0].snake is not None:
        raise ValueError("a chain begins with a layer without a Snake")
    if width != 1 or layers[-1].upsampling or layers[-1].is_residual:
        raise ValueError("a chain ends with an ordinary layer that has one output")


def _has_residual(layers: Sequence[WaveLayer], index: int) -> bool:
    layer, before = layers[index], layers[index - 1]
    if index < 2 or layer.upsampling or before.upsampling or before.is_residual:
        return False
    return _shape_of(before)[1] == _shape_of(layer)[0]


def _shape_of(layer: WaveLayer) -> tuple[int, int, int]:
    """Outputs, inputs, and taps, or twice the phases of an upsampling layer."""
    first, second, kernel_size = layer.weight.shape
    return (second, first, kernel_size) if layer.upsampling else (first, second, kernel_size)


def _pack(layers: Sequence[WaveLayer], index: int, arch: int) -> _Conv:
    layer, following = layers[index], layers[index + 1]
    span = LayerSpan.of(layer)
    weight = _taps_of(layer)  # [phases, outputs, taps, inputs]
    weight = _padded(_padded(weight, 3), 1)
    phases, width, num_taps, num_inputs = weight.shape
    snake = following.snake
    if snake is not None:
        snake = (_tiled(snake[0], phases), _tiled(snake[1], phases))
    return _Conv(
        weight=_split(weight.reshape(phases * width, num_taps * num_inputs)),
        bias=_tiled(layer.bias, phases),
        snake=snake,
        span=span,
        width=width,
        adds_plain=layer.is_residual,
        keeps_plain=index + 2 < len(layers) and layers[index + 2].is_residual,
        config=find_conv_config(arch, phases * width, num_inputs, num_taps),
    )


def _taps_of(layer: WaveLayer) -> Tensor:
    """Weights [phases, outputs, taps, inputs].

    A transposed convolution is one of two taps whose outputs are those of all phases: row ``q``
    of its product holds result rows ``q * upsampling ...`` ahead of the padding, to which inputs
    ``q - 1`` and ``q`` contribute.
    """
    weight = layer.weight.detach()
    if not layer.upsampling:
        return weight.transpose(1, 2)[None]
    before, here = weight[..., layer.upsampling :], weight[..., : layer.upsampling]
    return torch.stack((before, here)).permute(3, 2, 0, 1)


def _tiled(values: Tensor, phases: int) -> Tensor:
    """One value per channel as one per output of all phases."""
    return _padded(values.detach(), 0).repeat(phases)


def _padded(values: Tensor, dim: int) -> Tensor:
    """With channels, which are this dimension, filled up with zeros."""
    size = values.shape[dim]
    shape = list(values.shape)
    shape[dim] = _round_up(size) - size
    return torch.cat((values, values.new_zeros(shape)), dim)


def _split(values: Tensor) -> Pair:
    high = values.bfloat16()
    return high, (values - high.float()).bfloat16()


def _round_up(num_channels: int) -> int:
    return -(-num_channels // CHANNEL_QUANTUM) * CHANNEL_QUANTUM


def _arch_of(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
