"""The benchmark of products runs and reports every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cpu_linear
from vllm.kernels import native


@pytest.mark.skipif(native.loaded_library() is None, reason="the native library is not built")
def test_reports_all_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cpu_linear.NUM_BYTES, "cache", 1 << 14)
    path = tmp_path / "out.json"
    flags = ["--shapes", "64x32", "--rows", "2", "--num-rounds", "2", "--json", str(path)]
    assert cpu_linear.main(flags) == 0
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    formats = [line["format"] for line in results]
    assert formats == ["torch float32", "float32", "bfloat16", "int8", "int4"]
    assert results[0]["ratio"] == 1
    assert all(line["us"] > 0 and line["gb_per_s"] > 0 for line in results)
    assert "64 x 32, 2 rows, weights in cache, 1 threads" in capsys.readouterr().out


def test_without_the_library_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with native.disabled():
        assert cpu_linear.main([]) == 1
    assert "no native library" in capsys.readouterr().out
