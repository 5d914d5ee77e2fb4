"""The load program: its points, its picture, and what it says of a server that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serve_speech import main, plot
from vllm.benchmarks import Result, summarize


def test_plot_is_a_png(tmp_path: Path) -> None:
    good = summarize([Result(((0.2, 1.0),), finished_s=1.0)], wall_s=2.0)
    failed = summarize([Result(failure="status 500")], wall_s=2.0)
    points = [{"load": {"name": "1"}, **good}, {"load": {"name": "2"}, **failed}]
    plot(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_absent_server_is_one_line_and_status_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-url", "http://127.0.0.1:9", "--num-requests", "1"]) == 1
    assert "does not serve" in capsys.readouterr().err


def test_bad_load_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rate", "0"])
    assert "--rate" in capsys.readouterr().err
