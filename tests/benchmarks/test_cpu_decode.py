"""The measurement of decode steps runs, and compares the two paths."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.cpu_decode import make_checkpoint, measure, print_results
from vllm.kernels import native


@pytest.mark.skipif(native.loaded_library() is None, reason="the native library is not built")
def test_both_paths_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path, "tiny", num_layers=1)
    result = measure(
        tmp_path,
        2,
        ["torch", "float32"],
        num_rounds=2,
        num_threads=1,
        clock=time.perf_counter,
    )
    assert result["seconds"].keys() == {"torch", "float32"}
    assert result["ratio"]["torch"] == 1
    assert all(value > 0 for value in result["seconds"].values())
    print_results([result])
    assert "x float32" in capsys.readouterr().out
