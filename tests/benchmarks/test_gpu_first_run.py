"""The driver of the first minutes on a card, with small programs in the place of its stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_first_run, gpu_suite
from benchmarks.gpu_first_run import STAGES, Stage, main

# Takes its sections like the suite, and dies or loses the device in one of them.
_FAKE_SUITE = """
import argparse, json, sys
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--json", type=Path)
parser.add_argument("--plot", type=Path)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--sections", nargs="+")
given = parser.parse_args()
written = json.loads(given.json.read_text()) if given.resume else {"seconds": {}}
for name in given.sections:
    if name == "dies":
        sys.exit(1)
    written["seconds"][name] = 1.0
    given.json.write_text(json.dumps(written))
    if name == "loses":
        sys.exit(3)
print("verdict")
"""


def run(folder: Path, *stages: Stage, seconds: float = 300) -> str:
    main(["--out", str(folder), "--seconds", str(seconds)], stages=stages)
    return (folder / "summary.txt").read_text(encoding="utf-8")


def stage(name: str, code: str, **options: object) -> Stage:
    defaults = {"seconds": 120.0, "packages": ()}
    return Stage(name, arguments=("-c", code), **defaults | options)


def test_one_that_fails_keeps_no_other_from_running(tmp_path: Path) -> None:
    summary = run(
        tmp_path,
        stage("absent", "pass", packages=("no_such_package",)),
        stage("broken", "raise RuntimeError('the reason')"),
        stage("good", "open(r'OUT/made', 'w').close()"),
    )
    assert "absent: left out (not installed: no_such_package)" in summary
    assert "RuntimeError: the reason" in summary
    assert "broken: failed (exit code 1" in summary
    assert summary.splitlines()[-1] == "in all: absent left out, broken failed, good passed"
    assert {each.name for each in tmp_path.iterdir()} == {"summary.txt", "log.txt", "made"}


def test_one_that_hangs_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_first_run, "_MIN_SECONDS", 0.0)
    hanging = stage("hangs", "import time\nwhile True: time.sleep(1)", seconds=0.5)
    summary = run(tmp_path, hanging, stage("good", "pass"))
    assert "hangs: cut off" in summary
    assert "good: passed" in summary


def test_nothing_is_begun_without_time(tmp_path: Path) -> None:
    assert "good: left out (no time left)" in run(tmp_path, stage("good", "pass"), seconds=1)


def test_a_suite_goes_on_behind_what_ended_it(tmp_path: Path) -> None:
    sections = ("one", "dies", "two", "loses", "three")
    summary = run(tmp_path, stage("fake", _FAKE_SUITE, sections=sections))
    written = json.loads((tmp_path / "fake.json").read_text(encoding="utf-8"))
    assert list(written["seconds"]) == ["one", "two", "loses", "three"]
    assert "fake: failed (exit code 1" in summary
    assert "verdict" in summary


def test_all_sections_of_the_suite_are_run() -> None:
    whole = next(each for each in STAGES if each.name == "suite")
    assert set(whole.sections) == {*gpu_suite.SECTIONS, "profile"}
    assert gpu_first_run._DEVICE_LOST == gpu_suite.DEVICE_LOST


def test_stages_leave_at_most_eight_files() -> None:
    per_suite = sum(2 for each in STAGES if each.sections)
    named = sum("OUT/" in argument for each in STAGES for argument in each.arguments)
    assert len(("summary.txt", "log.txt")) + per_suite + named <= 8


def test_the_script_needs_no_package(repo_root: Path, tmp_path: Path) -> None:
    """Where nothing is installed each stage says what it lacks."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    done = subprocess.run(
        [str(repo_root / "scripts" / "gpu-first-run"), "--out", str(tmp_path / "out")],
        env={"PATH": os.environ["PATH"], "PYTHON": str(bare)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.count("left out (not installed: torch, triton, numpy") == len(STAGES), (
        done.stdout + done.stderr
    )
