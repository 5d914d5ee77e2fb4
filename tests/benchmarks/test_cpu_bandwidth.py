"""Bandwidth of decode steps: the program runs, and predicts by bytes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import cpu_bandwidth
from benchmarks.cpu_bandwidth import make_checkpoint, measure, print_results
from vllm.kernels import native

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@pytest.mark.skipif(native.loaded_library() is None, reason="the native library is not built")
def test_steps_are_predicted_from_the_layers_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_bandwidth, "READ_BYTES", 1 << 20)
    monkeypatch.setitem(cpu_bandwidth.SHAPES, "small", (SIZES, 8, 2))
    make_checkpoint(tmp_path, "small")
    lines = measure(
        tmp_path,
        "small",
        ["float32", "int8"],
        num_rounds=2,
        num_threads=1,
        clock=time.perf_counter,
    )
    layer = 4 * 128 * (2 * 128 + 2 * 64 + 3 * 256)
    head = 4 * 128 * 8 * 1026
    plain, rounded = lines
    # Matrices are padded a little.
    assert plain["num_bytes"] == pytest.approx(2 * layer + head, rel=0.01)
    assert plain["real_time_bytes_per_s"] == pytest.approx((8 * layer + head) * 25, rel=0.01)
    assert plain["whole_step_s"] / plain["step_s"] == pytest.approx(
        (8 * layer + head) / (2 * layer + head), rel=0.01
    )
    assert 0.25 < rounded["num_bytes"] / plain["num_bytes"] < 0.3
    print_results(lines)
    assert "small, int8" in capsys.readouterr().out
