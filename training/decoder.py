"""The codec's decoder as it is trained: codes to samples, in the shape of Higgs Audio v2's.

Weights have the published names, with weight norm, which the export folds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["KERNEL", "RATIOS", "WIDTH", "Decoder", "ResidualUnits", "Snake", "norm_conv"]

WIDTH = 192
RATIOS = (8, 5, 4, 2, 3)
_DILATIONS = (1, 3, 9)
KERNEL = 7


class Snake(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha * x).sin().square() / (self.alpha + 1e-9)


def norm_conv(in_channels: int, out_channels: int, kernel: int, dilation: int = 1) -> nn.Module:
    padding = dilation * (kernel // 2)
    conv = nn.Conv1d(in_channels, out_channels, kernel, padding=padding, dilation=dilation)
    return weight_norm(conv)


class _ResidualUnit(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.snake1, self.snake2 = Snake(channels), Snake(channels)
        self.conv1 = norm_conv(channels, channels, KERNEL, dilation)
        self.conv2 = norm_conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x))))


class ResidualUnits(nn.Module):
    """What each block has, of either direction."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res_unit1, self.res_unit2, self.res_unit3 = (
            _ResidualUnit(channels, dilation) for dilation in _DILATIONS
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_unit3(self.res_unit2(self.res_unit1(x)))


class _Block(ResidualUnits):
    def __init__(self, channels: int, stride: int) -> None:
        half = channels // 2
        super().__init__(half)
        self.snake1 = Snake(channels)
        conv = nn.ConvTranspose1d(
            *(channels, half, 2 * stride, stride),
            padding=math.ceil(stride / 2),
            output_padding=stride % 2,
        )
        self.conv_t1 = weight_norm(conv)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.conv_t1(self.snake1(x)))


class Decoder(nn.Module):
    """Vectors [B, size, T] to samples [B, T * 960]."""

    def __init__(self, size: int, width: int = WIDTH) -> None:
        super().__init__()
        self.conv1 = norm_conv(size, width, KERNEL)
        self.block = nn.ModuleList(_Block(width >> at, ratio) for at, ratio in enumerate(RATIOS))
        narrow = width >> len(RATIOS)
        self.snake1 = Snake(narrow)
        self.conv2 = norm_conv(narrow, 1, KERNEL)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in self.block:
            x = block(x)
        return self.conv2(self.snake1(x))[:, 0]
