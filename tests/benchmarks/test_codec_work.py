"""Counted operations against torch's own count, and what parts of windows save."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._codec_work import codec_without_values, multiply_adds, whole_window
from benchmarks.codec_decode import main
from vllm.model_executor.codecs import WindowShape

STEADY = WindowShape(45, 10, 35)


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_whole_windows_take_what_torch_counts(size: str) -> None:
    codec = codec_without_values(size)
    codes = torch.zeros(1, codec.num_codebooks, 45, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        codec.decode(codes)
    # A transposed convolution begins within a step and ends within one, so it has one more.
    counted = 2 * multiply_adds(codec, whole_window(45))
    assert counted == pytest.approx(counter.get_total_flops(), rel=2e-3)
    assert counted > counter.get_total_flops()


def test_parts_take_less_than_two_thirds_tiles_included() -> None:
    codec = codec_without_values("full")
    for arch in (None, 80, 90):
        whole = multiply_adds(codec, whole_window(45), arch=arch)
        assert 25 / 45 < multiply_adds(codec, STEADY, arch=arch) / whole < 0.65
    assert multiply_adds(codec, STEADY) < multiply_adds(codec, STEADY, arch=90)


def test_the_count_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--count", "--sizes", "tiny", "--num-frames", "102"]) == 0
    printed = capsys.readouterr().out
    assert "45 frames, 10 to 35" in printed
    assert "stream of 102 frames" in printed
