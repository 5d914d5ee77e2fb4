"""The first minutes on a card: everything that has to be known of it, the most worth first.

Each stage is a program of its own with a time limit, so that none can cost the others theirs: one
that breaks, hangs or lacks a package is a line in the summary. All of it lies in one folder of at
most eight files, which grow while it runs. Needs Python alone; stages need what they need.

    python -m benchmarks.gpu_first_run --out OUT --seconds 560
    python -m benchmarks.gpu_first_run --out OUT --seconds 560 --stages suite
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["STAGES", "Stage", "main"]

_ROOT = Path(__file__).resolve().parent.parent
_TAIL_LINES = 25  # of a stage that failed, in the summary
_GRACE_S = 10.0  # in which a program that was asked to end does so
_MIN_SECONDS = 15.0  # with less left, a stage is not begun
_DEVICE_LOST = 3  # gpu_suite.DEVICE_LOST: the section is over, and the others want a new process
_TEST_PROCESSES = 6  # which compile what they test, each on a core
_NEEDS = ("torch", "triton", "numpy", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Stage:
    """One program.

    Attributes:
        name: on the command line and in the summary.
        seconds: that it may take at most.
        arguments: of Python; ``OUT`` stands for the folder.
        packages: without which there is no point in beginning.
        sections: of the suite; those that are left over when it ends early are begun anew.
    """

    name: str
    seconds: float
    arguments: tuple[str, ...]
    packages: tuple[str, ...] = _NEEDS
    sections: tuple[str, ...] = ()


# Warnings of other versions than those of the tests' own environment are no news here.
_PYTEST = ("-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "--durations=8")
_SUITE = ("-m", "benchmarks.gpu_suite")
# Of the suite, by worth.
SECTIONS = (
    *("ceilings", "step", "engine", "correctness", "invariance"),
    *("prefill", "codec", "micro", "profile"),
)

STAGES = (
    Stage("compile", 150, ("-m", "benchmarks.gpu.compile_ahead")),
    Stage(
        "steps",
        120,
        (*_PYTEST, "-m", "gpu", "tests/v1/engine/test_device_steps.py"),
        (*_NEEDS, "pytest"),
    ),
    Stage("quick", 420, (*_SUITE, "--quick", "--seconds", "90"), sections=SECTIONS[:-1]),
    Stage(
        "kernels",
        240,
        (*_PYTEST, "-k", "not compile", "tests/kernels/triton"),
        (*_NEEDS, "pytest", "hypothesis"),
    ),
    Stage(
        "invariance",
        120,
        (
            *("-m", "benchmarks.invariance", "--device", "cuda", "--json", "OUT/invariance.json"),
            # Its utterances are long enough for pages to become scarce.
            *("--model", "higgs-audio-random", "--num-requests", "48", "--max-num-seqs", "32"),
        ),
    ),
    Stage("suite", 900, _SUITE, sections=SECTIONS),
)


def main(argv: Sequence[str] | None = None, *, stages: Sequence[Stage] = STAGES) -> int:
    names = [stage.name for stage in stages]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-first-run"), metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=560.0, help="for all of it")
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    arguments = parser.parse_args(argv)
    run = _Run(arguments.out.resolve(), time.monotonic() + arguments.seconds)
    run.say(_machine())
    for stage in stages:
        if stage.name in arguments.stages:
            run.take(stage)
    run.say(f"in all: {', '.join(f'{name} {word}' for name, word in run.outcomes.items())}")
    return 0 if all(word == "passed" for word in run.outcomes.values()) else 1


class _Outcome(NamedTuple):
    word: str
    details: str
    status: int | None = None  # exit code, where there is one


_NO_TIME = _Outcome("left out", "no time left")


class _Run:
    """What was done so far, and how long it may still take."""

    def __init__(self, folder: Path, deadline: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._deadline = deadline
        self.outcomes: dict[str, str] = {}

    def say(self, text: str) -> None:
        """To the terminal, and to the summary."""
        print(text, flush=True)
        with (self._folder / "summary.txt").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def take(self, stage: Stage) -> None:
        """Run a stage, within its time and ours."""
        absent = [name for name in stage.packages if find_spec(name) is None]
        if absent:
            self._end(stage, _Outcome("left out", f"not installed: {', '.join(absent)}"))
            return
        deadline = min(self._deadline, time.monotonic() + stage.seconds)
        arguments = [each.replace("OUT", str(self._folder)) for each in stage.arguments]
        if "pytest" in stage.packages and find_spec("xdist") is not None:
            arguments += ["-n", str(_TEST_PROCESSES)]
        if stage.sections:
            self._end(stage, self._suite(stage, arguments, deadline))
        else:
            self._end(stage, self._program(stage, arguments, deadline))

    def _suite(self, stage: Stage, arguments: list[str], deadline: float) -> _Outcome:
        """Begun again behind the section that ended it, until all of them have been tried."""
        written = self._folder / f"{stage.name}.json"
        written.unlink(missing_ok=True)
        arguments += ["--json", str(written), "--plot", str(written.with_suffix(".png"))]
        left, more = list(stage.sections), []
        outcomes = []
        while left and deadline - time.monotonic() > _MIN_SECONDS:
            outcome = self._program(stage, [*arguments, *more, "--sections", *left], deadline)
            outcomes.append(outcome)
            done = _read(written).get("seconds", {})
            left = [name for name in left if name not in done]
            if outcome.status != _DEVICE_LOST:
                # The section in which the program ended would end it again.
                left = left[1:]
            more = ["--resume"]
        written.with_name(f"{written.name}.part").unlink(missing_ok=True)
        if not outcomes:
            return _NO_TIME
        return next((each for each in outcomes if each.word != "passed"), outcomes[0])

    def _program(self, stage: Stage, arguments: list[str], deadline: float) -> _Outcome:
        seconds = deadline - time.monotonic()
        if seconds < _MIN_SECONDS:
            return _NO_TIME
        log = self._folder / "log.txt"
        start = time.monotonic()
        with log.open("ab") as file:
            file.write(f"\n===== {stage.name}: {' '.join(arguments)}\n".encode())
            file.flush()
            offset = file.tell()
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=_ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = _wait(process, seconds)
        took = f"{time.monotonic() - start:.0f} s"
        if status != 0 or stage.sections:
            self.say(_tail(log, offset))
        if status == 0:
            return _Outcome("passed", took, status)
        if status is None:
            return _Outcome("cut off", took)
        return _Outcome("failed", f"exit code {status}, {took}", status)

    def _end(self, stage: Stage, outcome: _Outcome) -> None:
        self.outcomes[stage.name] = outcome.word
        self.say(f"{stage.name}: {outcome.word} ({outcome.details})")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Exit code; None if it had to be ended, with all that it started."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(_GRACE_S)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content


def _tail(log: Path, offset: int) -> str:
    lines = log.read_bytes()[offset:].decode(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])


def _machine() -> str:
    """Programs and packages, as far as they are there."""
    lines = [f"Python {sys.version.split()[0]} at {sys.executable}"]
    for command in (
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
        ["cc", "--version"],  # Triton compiles its launchers with it
        ["nvcc", "--version"],
    ):
        lines.append(f"{command[0]}: {_first_line(command)}")
    code = "import sys; from importlib.metadata import version as v; print(*((n, v(n)) for n in sys.argv[1:]))"
    lines.append(_first_line([sys.executable, "-c", code, *_NEEDS]))
    return "\n".join(lines)


def _first_line(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return "not there"
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else f"exit code {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
