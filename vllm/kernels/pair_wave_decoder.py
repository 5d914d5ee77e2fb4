"""Codes to samples on CUDA, in products of pairs of bfloat16 that are nearly those of float32.

The Python face of ``triton/pair_wave_decoder.py``, for the chains of convolutions that
``wave_decoder`` takes. The reference in torch is the codec's own module; nothing here knows a
codec's name or a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from vllm.kernels.conv_config import CHANNEL_QUANTUM, ConvConfig, find_conv_config
from vllm.kernels.wave_decoder import WaveLayer

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
    dilation: int
    shift: int
    width: int  # of a row of the result
    phases: int  # rows of the result for each of the input
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

    A window's samples have the same bits alone and beside others.

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
        self._last_dilation = last.dilation

    @property
    def device(self) -> torch.device:
        """Where codes have to be."""
        return self._table.device

    def build(self) -> None:
        """Have Triton build all kernels now, which takes it a minute when its cache is empty."""
        shape = (1, self._num_codebooks, 1)
        self(torch.zeros(shape, dtype=torch.int64, device=self.device))

    def __call__(self, codes: Tensor) -> Tensor:
        """Samples of codes [batch, K, num_frames], every one below the codebook's size.

        Returns:
            float32 [batch, num_frames * hop_length], from -1 to 1.
        """
        batch, num_codebooks, num_rows = codes.shape
        assert num_codebooks == self._num_codebooks
        x = self._new_pair(batch, num_rows, _round_up(self._table.shape[1]))
        if codes.numel():
            self._kernels.sum_codes(codes.contiguous(), self._table, self._table_bias, x)
        plain: Tensor | None = None
        for conv in self._convs:
            num_rows *= conv.phases
            out = self._new_pair(batch, num_rows, conv.width)
            residual = plain if conv.adds_plain else None
            if conv.keeps_plain and residual is None:
                plain = torch.empty(batch, num_rows, conv.width, device=self.device)
            if codes.numel():
                self._kernels.convolve(
                    *(x, conv.weight, conv.bias, conv.snake, residual, out),
                    plain if conv.keeps_plain else None,
                    conv.config,
                    dilation=conv.dilation,
                    shift=conv.shift,
                )
            x = out
        samples = torch.empty(batch, num_rows, device=self.device)
        if codes.numel():
            self._kernels.convolve_to_samples(
                x, self._last_weight, self._last_bias, samples, dilation=self._last_dilation
            )
        return samples

    def _new_pair(self, batch: int, num_rows: int, width: int) -> Pair:
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
    phases = max(layer.upsampling, 1)
    weight = _taps_of(layer)  # [phases, outputs, taps, inputs]
    weight = _padded(_padded(weight, 3), 1)
    _, width, num_taps, num_inputs = weight.shape
    snake = following.snake
    if snake is not None:
        snake = (_tiled(snake[0], phases), _tiled(snake[1], phases))
    return _Conv(
        weight=_split(weight.reshape(phases * width, num_taps * num_inputs)),
        bias=_tiled(layer.bias, phases),
        snake=snake,
        dilation=layer.dilation,
        shift=-(-layer.upsampling // 2) * width,
        width=width,
        phases=phases,
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
