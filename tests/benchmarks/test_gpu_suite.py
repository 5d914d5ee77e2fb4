"""The GPU script runs all of its logic at toy sizes, with no more than a bare CUDA image has."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu import floors, step
from benchmarks.gpu.floors import ASSUMED_H200
from benchmarks.gpu.ledger import TARGETS, Figure, Ledger
from benchmarks.gpu.random_engine import open_core, runner_of, write_folder
from benchmarks.gpu.suite import ABLATIONS, FULL, TOY, Suite
from vllm.checkpoints.make_model import make_model

# What serves HTTP, decodes files and draws: none of it may be needed.
ABSENT = (
    *("av", "boto3", "fastapi", "httpx", "huggingface_hub", "matplotlib", "msgspec", "pandas"),
    *("prometheus_client", "psutil", "pydantic", "scipy", "soxr", "starlette", "tqdm"),
    *("transformers", "uvicorn", "zmq"),
)


def run_suite(repo_root: Path, target: Path, *sections: str) -> tuple[str, dict]:
    code = (
        f"import sys\nfor name in {ABSENT!r}: sys.modules[name] = None\n"
        "from benchmarks.gpu_suite import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--device", "cpu", "--tiny", "--json", str(target)]
    command += ["--plot", str(target.with_suffix(".png")), "--sections", *sections]
    done = subprocess.run(
        command, cwd=repo_root, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(target.read_text(encoding="utf-8"))


def test_runs_without_a_gpu_and_without_server_packages(tmp_path: Path, repo_root: Path) -> None:
    printed, written = run_suite(repo_root, tmp_path / "out.json", "ceilings", "engine")
    assert printed.splitlines()[-1].startswith("RAN: toy sizes")
    assert "matplotlib is not installed" in printed
    names = {figure["name"]: figure for figure in written["figures"]}
    assert names["first audio p95, 1 stream, cached voice"]["ratio"] > 0  # a busy CPU has no floor
    assert names["streamed audio against one decode, largest difference"]["value"] <= 1e-4
    assert names["read, sum of float32"]["value"] > 0
    assert written["failures"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        ("correctness", "micro"),
        ("step", "--quick"),
        ("prefill", "codec", "--profile"),
        ("invariance",),
    ],
)
def test_every_section_runs(tmp_path: Path, repo_root: Path, sections: tuple[str, ...]) -> None:
    _, written = run_suite(repo_root, tmp_path / "out.json", *sections)
    assert written["failures"] == []
    measured = {figure["section"] for figure in written["figures"]}
    assert measured >= {each for each in sections if not each.startswith("--")}


@pytest.mark.slow
def test_kernels_are_built_ahead(repo_root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.compile_ahead"]
    command += ["--device", "cpu", "--tiny", "--jobs", "1"]
    done = subprocess.run(
        command, cwd=repo_root, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("chosen", "measured"),
    [
        ((), [""]),
        (("prefetch",), ["", " weights fetched ahead"]),
        (("eager", "fp8", "tf32"), ["", " eager", " fp8"]),
    ],
)
def test_ablations_are_those_that_were_chosen(
    chosen: tuple[str, ...], measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(step, "_measure", lambda suite, suffix, *rest: taken.append(suffix))
    suite = Suite(
        device=torch.device("cpu"),
        scale=TOY,
        folder=tmp_path,
        config=make_model(tmp_path, size=TOY.model, with_weights=False),
        ceilings=ASSUMED_H200,
        ledger=Ledger(),
        ablations=chosen,
    )
    step.run(suite)
    assert taken == measured


def test_an_ablation_of_steps_is_known_by_its_name() -> None:
    assert step._ablations(2).keys() <= ABLATIONS.keys()


def test_an_engine_that_is_closed_leaves_its_memory_to_the_next(tmp_path: Path) -> None:
    """Two of them may be more than a card holds, whoever still has a name for a part of one."""
    suite = make_suite(tmp_path)
    suite.config = write_folder(tmp_path, TOY)
    with open_core(suite, decodes_audio=False, max_num_seqs=1, kv_cache_memory=8 << 20) as core:
        runner = runner_of(core)
        large = [weakref.ref(runner._kv_caches[0]), weakref.ref(core._executor._worker._model)]
        assert all(each() is not None for each in large)
    assert [each() for each in large] == [None, None], runner


def test_floors_are_those_of_the_design(tmp_path: Path) -> None:
    """Counted from the configuration of the published model: 2.844 G weights, 112 KiB a position."""
    config = make_model(tmp_path, size=FULL.model, with_weights=False)
    one = floors.decode_step(config, 1, 800, weight_itemsize=2, kv_itemsize=2)
    assert one.weight_bytes == pytest.approx(5.688e9, rel=1e-3)
    assert one.kv_bytes == 800 * 114_688
    assert one.floor_s(ASSUMED_H200) == pytest.approx(1.34e-3, rel=5e-3)
    many = floors.decode_step(config, 256, 1500, weight_itemsize=2, kv_itemsize=2)
    assert many.floor_s(ASSUMED_H200) == pytest.approx(12.1e-3, rel=5e-3)
    prompt = floors.prefill(config, 300, 300, weight_itemsize=2, kv_itemsize=2)
    assert prompt.weight_bytes == pytest.approx(9.87e9, rel=5e-3)
    assert prompt.floor_s(ASSUMED_H200) == pytest.approx(4.3e-3, rel=0.05)


def figure(name: str, value: float, *, is_wrong: bool = False) -> Figure:
    return Figure("step", name, value, "ms", bound=1.0, is_wrong=is_wrong)


def test_the_last_line_says_what_was_met_missed_and_left_out() -> None:
    musts = [each for each in TARGETS if each.must is not None]
    met = Ledger([figure(each.figure, each.must) for each in musts])
    assert met.verdict(is_toy=False) == (
        f"PASS: {len(musts)} of {len(musts)} musts met, 0 missed, 0 not measured",
        True,
    )

    missed = Ledger([*met.figures[1:], figure(musts[0].figure, 1e9)])
    line, is_right = missed.verdict(is_toy=False)
    assert (line[:4], is_right) == ("FAIL", False)

    line, is_right = Ledger(met.figures[1:]).verdict(is_toy=False)
    assert (line[:10], is_right) == ("INCOMPLETE", True)

    line, is_right = Ledger([*met.figures, figure("a check", 1, is_wrong=True)]).verdict(
        is_toy=False
    )
    assert line.endswith("; wrong: a check")
    assert not is_right


def test_a_later_run_goes_on_with_what_an_earlier_one_wrote(tmp_path: Path) -> None:
    earlier, path = make_suite(tmp_path / "earlier"), tmp_path / "out.json"
    earlier.ceilings = replace(ASSUMED_H200, source="measured in this run")
    earlier.begin("step")
    earlier.add("a step", 2.0, "ms", bound=1.0)
    earlier.note("something left out")
    earlier.ledger.failures.append("section codec")
    earlier.extras["seconds"] = {"step": 1.5}
    gpu_suite._write(path, earlier)

    later = make_suite(tmp_path / "later")
    gpu_suite._resume(later, json.loads(path.read_text(encoding="utf-8")))

    assert later.ledger == earlier.ledger
    assert later.ceilings == earlier.ceilings
    assert later.extras == earlier.extras
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["out.json"]


def test_figures_are_written_while_a_section_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "_FLUSH_S", 0.0)
    suite, path = make_suite(tmp_path / "folder"), tmp_path / "out.json"
    suite.flush = gpu_suite._flusher(path, suite)
    suite.begin("step")
    suite.add("a step", 2.0, "ms")
    assert json.loads(path.read_text(encoding="utf-8"))["figures"][0]["name"] == "a step"


def make_suite(folder: Path) -> Suite:
    config = make_model(folder, size="tiny", with_weights=False)
    cpu = torch.device("cpu")
    return Suite(cpu, TOY, folder, config, ceilings=ASSUMED_H200, ledger=Ledger())


def test_a_case_that_fails_is_a_failure_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = make_suite(tmp_path)
    suite.begin("micro")
    with suite.attempt("a kernel"):
        raise RuntimeError("the reason")
    assert suite.ledger.failures == ["micro: a kernel"]
    assert "the reason" in suite.extras["micro: a kernel failure"]
    line, is_right = suite.ledger.verdict(is_toy=False)
    assert (line[:4], is_right) == ("FAIL", False)
    # Nothing can follow on a device that is gone.
    monkeypatch.setattr("benchmarks.gpu.suite.is_lost", lambda device: True)
    with pytest.raises(RuntimeError, match="the reason"), suite.attempt("a kernel"):
        raise RuntimeError("the reason")


def test_a_lost_device_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite, ran = make_suite(tmp_path), []
    monkeypatch.setattr(gpu_suite, "_run", lambda _, section: ran.append(section))
    monkeypatch.setattr(gpu_suite, "is_lost", lambda _: len(ran) >= 2)
    assert not gpu_suite._run_all(suite, ["ceilings", "step", "codec"], None)
    assert ran == ["ceilings", "step"]
    assert "codec" in suite.ledger.notes[-1]


def test_ratios_are_at_least_one_for_times_and_for_rates() -> None:
    assert Figure("s", "n", 3.0, "ms", bound=1.5).ratio == 2
    assert Figure("s", "n", 500.0, "audio-s/s", bound=1000.0).ratio == 2
    assert Figure("s", "n", 0.0, "").ratio is None
