"""What the package knows of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm.platforms import num_cores

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")


def describe_cpus(folder: Path, siblings: dict[int, str]) -> None:
    for cpu, text in siblings.items():
        path = folder / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(f"{text}\n")


@needs_affinity
def test_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe_cpus(tmp_path, {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 5})
    assert num_cores(tmp_path) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4})
    assert num_cores(tmp_path) == 1


@needs_affinity
def test_where_nothing_is_said_every_processor_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert num_cores(tmp_path) == 3


def test_this_machine_has_cores() -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
