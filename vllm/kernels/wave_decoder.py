"""Codes to samples as one native call, which holds no interpreter lock.

The Python face of ``csrc/wave_decoder.cc``: a chain of convolutions with Snakes between them, as
codecs in the shape of DAC have it. The reference in torch is the codec's own module; nothing here
knows a codec's name or a request.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm.kernels import native

__all__ = ["WaveDecoder", "WaveLayer"]


@dataclass(frozen=True, eq=False)
class WaveLayer:
    """One convolution over time, padded so that it has as many rows out as in.

    Attributes:
        weight: [num_outputs, num_inputs, kernel] with an odd kernel; of an upsampling layer
            [num_inputs, num_outputs, 2 * upsampling].
        bias: [num_outputs].
        dilation: rows between taps.
        upsampling: rows out for each row in, of a transposed convolution with that stride and a
            padding of ``ceil(stride / 2)``; 0 for an ordinary convolution.
        snake: alpha and its inverse [num_inputs] of ``x + sin(alpha * x) ** 2 * inverse``, which
            inputs go through first.
        is_residual: add what went into the layer before, ahead of its Snake.
    """

    weight: Tensor
    bias: Tensor
    dilation: int = 1
    upsampling: int = 0
    snake: tuple[Tensor, Tensor] | None = None
    is_residual: bool = False


class _LayerStruct(ctypes.Structure):
    """``hav_wave_layer``."""

    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("num_outputs", c_int64),
        ("num_inputs", c_int64),
        ("kernel_size", c_int64),
        ("dilation", c_int64),
        ("upsampling", c_int64),
        ("alpha", c_void_p),
        ("inverse", c_void_p),
        ("is_residual", c_int32),
    )


class _ModelStruct(ctypes.Structure):
    """``hav_wave_model``."""

    _fields_ = (
        ("table", c_void_p),
        ("table_bias", c_void_p),
        ("num_codebooks", c_int64),
        ("codebook_size", c_int64),
        ("width", c_int64),
        ("num_layers", c_int64),
        ("layers", POINTER(_LayerStruct)),
    )


class WaveDecoder:
    """Packed copies of the layers, for the instruction set in use.

    What it gives for one frame depends neither on the number of threads nor on which other frames
    are asked for, to the bit.

    Args:
        table: float32 [num_codebooks * codebook_size, width]; the sum of one row per codebook and
            of the bias goes into the first layer.
        table_bias: float32 [width].
        layers: the first without a Snake, the last with one output; all float32 on the CPU.

    Raises:
        ValueError: the layers are no such chain, or there is no memory to pack them.
    """

    def __init__(
        self, table: Tensor, table_bias: Tensor, num_codebooks: int, layers: Sequence[WaveLayer]
    ) -> None:
        lib = native.loaded_library()
        assert lib is not None, "ask native.loaded_library() first"
        self._lib = lib
        self._table = table.detach().contiguous()
        self._table_bias = table_bias.detach().contiguous()
        self._num_codebooks = num_codebooks
        self._codebook_size = table.shape[0] // num_codebooks
        self._hop_length = 1
        for layer in layers:
            self._hop_length *= max(layer.upsampling, 1)
        contiguous = [_contiguous(layer) for layer in layers]
        structs = [_struct_of(layer) for layer in contiguous]
        model = _ModelStruct(
            self._table.data_ptr(),
            self._table_bias.data_ptr(),
            num_codebooks,
            self._codebook_size,
            table.shape[1],
            len(structs),
            (_LayerStruct * len(structs))(*structs),
        )
        self._handle: int | None = lib.hav_wave_decoder_create(ctypes.addressof(model))
        if self._handle is None:
            raise ValueError("its layers are no chain of convolutions, or memory is short")

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self._lib.hav_wave_decoder_destroy(self._handle)

    @property
    def num_bytes(self) -> int:
        """Memory of the packed layers."""
        return int(self._lib.hav_wave_decoder_num_bytes(self._handle))

    def __call__(self, codes: Tensor, first_frame: int, last_frame: int) -> Tensor:
        """Samples of frames ``first_frame .. last_frame - 1`` of codes int64 [K, num_frames].

        Frames beyond are context, read as far as these samples depend on them.

        Returns:
            float32 [(last_frame - first_frame) * hop_length], from -1 to 1.

        Raises:
            IndexError: a code is none of the codebook's.
            MemoryError: there is no memory for the work.
        """
        num_frames = codes.shape[1]
        assert codes.shape[0] == self._num_codebooks
        assert 0 <= first_frame <= last_frame <= num_frames
        codes = codes.long().contiguous()
        if num_frames and not 0 <= codes.min() <= codes.max() < self._codebook_size:
            raise IndexError(
                f"codes {int(codes.min())}..{int(codes.max())}, allowed are "
                f"0..{self._codebook_size - 1}"
            )
        samples = torch.empty((last_frame - first_frame) * self._hop_length)
        status = self._lib.hav_wave_decode(
            native.pool(),
            self._handle,
            codes.data_ptr(),
            num_frames,
            num_frames,
            first_frame,
            last_frame,
            samples.data_ptr(),
        )
        if status != 0:
            raise MemoryError(f"no memory to decode {num_frames} frames")
        return samples


def _contiguous(layer: WaveLayer) -> WaveLayer:
    snake = layer.snake
    if snake is not None:
        snake = (snake[0].detach().contiguous(), snake[1].detach().contiguous())
    return WaveLayer(
        layer.weight.detach().contiguous(),
        layer.bias.detach().contiguous(),
        layer.dilation,
        layer.upsampling,
        snake,
        layer.is_residual,
    )


def _struct_of(layer: WaveLayer) -> _LayerStruct:
    num_outputs, num_inputs, kernel_size = layer.weight.shape
    if layer.upsampling:
        num_outputs, num_inputs = num_inputs, num_outputs
    alpha, inverse = layer.snake or (None, None)
    return _LayerStruct(
        layer.weight.data_ptr(),
        layer.bias.data_ptr(),
        num_outputs,
        num_inputs,
        kernel_size,
        layer.dilation,
        layer.upsampling,
        None if alpha is None else alpha.data_ptr(),
        None if inverse is None else inverse.data_ptr(),
        layer.is_residual,
    )
