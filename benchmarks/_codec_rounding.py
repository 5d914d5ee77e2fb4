"""What is left of a codec's samples when its products read rounded numbers.

Emulated by torch on a CPU, so it says nothing of time. Sums, biases, Snakes and residuals stay
float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vllm.checkpoints.embedded import embedded_checkpoint
from vllm.checkpoints.make_codec import make_codec
from vllm.kernels import native
from vllm.model_executor.codecs import Codec, load_codec

__all__ = ["measure_rounding"]

Rounding = Callable[[Tensor], Tensor]
Convolution = nn.Conv1d | nn.ConvTranspose1d


def measure_rounding(size: str, *, num_frames: int) -> dict[str, float]:
    """Signal-to-noise ratio of the samples, dB, by what products read.

    int8 weights have a scale per output, inputs one per position. TF32 drops the lowest 13 bits of
    what it reads, and rounded has float16's.

    Args:
        size: of a random codec, or embedded for that of the embedded model.
        num_frames: of random codes.
    """
    codec = _load(size)
    shape = (1, codec.num_codebooks, num_frames)
    codes = torch.randint(codec.codebook_size, shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), native.disabled():
        exact = codec.decode(codes)
        ratios = {}
        for name, variant in _VARIANTS.items():
            with _rounded_products(codec, variant):
                error = (codec.decode(codes) - exact).square().mean()
            ratios[name] = 10 * torch.log10(exact.square().mean() / error).item()
    return ratios


def _load(size: str) -> Codec:
    if size == "embedded":
        return load_codec(embedded_checkpoint() / "codec", device="cpu")
    with tempfile.TemporaryDirectory() as name:
        make_codec(Path(name), layout="transformers", size=size, seed=0)
        return load_codec(Path(name), device="cpu")


class _Variant(NamedTuple):
    """How numbers are rounded."""

    weights: Rounding  # [num_outputs, num_inputs, kernel]
    inputs: Rounding  # [batch, num_inputs, time]
    ends_are_exact: bool = False


@contextmanager
def _rounded_products(codec: Codec, variant: _Variant) -> Iterator[None]:
    """Within it, the decoder's convolutions read rounded numbers."""
    decoder = codec.get_submodule("acoustic_decoder")
    convolutions = [
        module
        for name, module in decoder.named_modules()
        if isinstance(module, Convolution)
        and not (variant.ends_are_exact and name in ("conv1", "conv2"))
    ]
    plain = [each.weight.data for each in convolutions]
    hooks = [
        each.register_forward_pre_hook(lambda _, inputs: (variant.inputs(inputs[0]), *inputs[1:]))
        for each in convolutions
    ]
    for each in convolutions:
        each.weight.data = _rounded_weight(each, variant.weights)
    try:
        yield
    finally:
        for each, weight, hook in zip(convolutions, plain, hooks, strict=True):
            each.weight.data = weight
            hook.remove()


def _rounded_weight(convolution: Convolution, rounding: Rounding) -> Tensor:
    weight = convolution.weight.data
    if isinstance(convolution, nn.ConvTranspose1d):  # its inputs come first
        return rounding(weight.transpose(0, 1)).transpose(0, 1).contiguous()
    return rounding(weight)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _bfloat16_pair(x: Tensor) -> Tensor:
    """What two bfloat16 numbers hold of ``x``: the product of pairs is three of bfloat16."""
    high = _bfloat16(x)
    return high + _bfloat16(x - high)


def _float16(x: Tensor) -> Tensor:
    return x.half().float()


def _tf32(x: Tensor) -> Tensor:
    """``x`` as tensor cores read float32: the lowest 13 bits are not looked at."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def _int8_weights(x: Tensor) -> Tensor:
    return _int8(x, (1, 2))


def _int8_inputs(x: Tensor) -> Tensor:
    return _int8(x, (1,))


def _int8(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """``x`` in steps of a 127th of its largest magnitude over ``dim``."""
    scale = x.abs().amax(dim, keepdim=True).clamp_(min=1e-30) / 127
    return (x / scale).round_() * scale


_VARIANTS = {
    "bfloat16 weights": _Variant(_bfloat16, _unchanged),
    "bfloat16": _Variant(_bfloat16, _bfloat16),
    "float16 weights": _Variant(_float16, _unchanged),
    "float16": _Variant(_float16, _float16),
    "float16, ends exact": _Variant(_float16, _float16, ends_are_exact=True),
    "TF32": _Variant(_tf32, _tf32),
    "TF32, ends exact": _Variant(_tf32, _tf32, ends_are_exact=True),
    "bfloat16 pairs": _Variant(_bfloat16_pair, _bfloat16_pair),
    "int8 weights": _Variant(_int8_weights, _unchanged),
    "int8": _Variant(_int8_weights, _int8_inputs),
}
