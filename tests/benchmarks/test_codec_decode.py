"""The codec benchmark compares like with like: it checks the samples before it times them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._codec_rounding import measure_rounding


def test_tiny_codec_is_measured_and_written(tmp_path: Path, repo_root: Path) -> None:
    target = tmp_path / "out.json"
    # A process of its own, since the program puts a stand-in in the place of torchaudio.
    command = [sys.executable, "-m", "benchmarks.codec_decode", "--json", str(target)]
    command += ["--sizes", "tiny", "--num-frames", "30", "--num-rounds", "1"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tiny" in done.stdout
    written = json.loads(target.read_text(encoding="utf-8"))
    assert {"date", "machine", "commit", "command"} <= written["circumstances"].keys()
    (result,) = written["results"]
    assert result["audio_s"] == pytest.approx(1.2)
    rivals = {"one-shot", "torch", "transformers", "streamed", "torch streamed", "first chunk"}
    assert result["seconds"].keys() == rivals


def test_fewer_bits_are_noisier() -> None:
    ratios = measure_rounding("tiny", num_frames=4)
    assert ratios["bfloat16 weights"] > ratios["int8 weights"] > 5
    assert ratios["bfloat16"] > ratios["int8"] > 5


@pytest.mark.parametrize("size", ["tiny", "embedded"])
def test_sixty_decibels_take_more_bits_than_one_product_of_halves_has(size: str) -> None:
    """Why the codec on CUDA is float32: what is wanted is 60 dB with any weights."""
    ratios = measure_rounding(size, num_frames=20)
    assert ratios["TF32"] < 50, "which cuDNN would use"
    assert ratios["bfloat16"] < ratios["TF32"] < ratios["float16"] < 61
    assert ratios["float16"] < ratios["float16, ends exact"]
    assert ratios["bfloat16 pairs"] > 80
