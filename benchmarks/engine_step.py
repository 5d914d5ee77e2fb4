"""Where the time of a decode step goes, and whether it stays there as finished requests pile up.

The parts are timed from outside, by wrapping methods of the engine: ``schedule``, ``prepare``
(rows, block tables, metadata), ``forward`` (embedding and model), ``sample`` (head, sampler,
stream state); ``output`` is the rest of ``EngineCore.step``. A native step is all ``forward``. The
codec is replaced by one that decodes nothing, and sampling is the default (top-k, top-p, RAS).

    python -m benchmarks.engine_step
    python -m benchmarks.engine_step --sizes tiny --json out.json --plot out.png
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks._engine import make_core, make_request
from benchmarks._report import format_table, write_json
from vllm.checkpoints import run_make
from vllm.v1.core.sched_output import StepKind
from vllm.v1.engine.core import EngineCore

PARTS = ("schedule", "prepare", "forward", "sample", "output")
_OUTSIDE = ("schedule", "prepare", "output")  # of the forward pass and sampling
_WARM_STEPS = 5
_SHORT_FRAMES = 10
_SHORT_PROMPT = 8


class StepTimer:
    """Seconds of each part of each decode step of an engine that has all its rows busy."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._current: defaultdict[str, float] = defaultdict(float)
        self._plan: Any = None
        runner = core._executor._worker._runner  # type: ignore[attr-defined]
        self._wrap(core._scheduler, "schedule", "schedule", keep_result=True)
        decoder = runner._decoder
        for owner, name in (
            (runner, "_update_states"),
            (runner, "_prepare_decode"),
            (decoder, "_metadata"),
        ):
            self._wrap(owner, name, "prepare")
        if decoder._native_step is not None:
            self._wrap(decoder, "_native_step", "forward")
        self._wrap(runner._state, "embed_last_content", "forward")
        self._wrap(decoder._owners.model, "forward", "forward")
        self._wrap(runner._state, "next_content", "sample")

    def step(self) -> tuple[int, dict[str, float]]:
        """Run one step; rows decoded (0 in any other step) and seconds of each part."""
        self._current.clear()
        start = time.perf_counter()
        self._core.step()
        total = time.perf_counter() - start
        seconds = {part: self._current[part] for part in PARTS}
        seconds["output"] = total - sum(seconds.values())
        is_decode = self._plan.step_kind is StepKind.DECODE
        return len(self._plan.decode) if is_decode else 0, seconds

    def _wrap(self, owner: Any, name: str, part: str, *, keep_result: bool = False) -> None:
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **kwargs)
            self._current[part] += time.perf_counter() - start
            if keep_result:
                self._plan = result
            return result

        setattr(owner, name, timed)


def measure_split(
    checkpoint: Path, size: str, batch_size: int, *, num_steps: int, num_threads: int
) -> dict[str, Any]:
    """Median seconds of the parts of a step that decodes ``batch_size`` requests."""
    core = make_core(
        checkpoint, decodes_audio=False, max_num_seqs=batch_size, cpu_threads=num_threads
    )
    timer = StepTimer(core)
    for index in range(batch_size):
        core.add_request(make_request(str(index), num_frames=400, seed=index))
    steps: list[dict[str, float]] = []
    with tqdm(total=num_steps, desc=f"{size}, batch {batch_size}", unit="step") as progress:
        while len(steps) < num_steps + _WARM_STEPS:
            num_rows, seconds = timer.step()
            if num_rows == batch_size:
                steps.append(seconds)
                progress.update(len(steps) > _WARM_STEPS)
    core.shutdown()
    timed = steps[_WARM_STEPS:]
    parts = {part: median(step[part] for step in timed) for part in PARTS}
    return {
        "size": size,
        "batch_size": batch_size,
        "num_threads": num_threads,
        "load_average": os.getloadavg()[0],
        "seconds": parts,
        "step_s": median(sum(step.values()) for step in timed),
        "outside_share": median(_outside(step) / sum(step.values()) for step in timed),
    }


def measure_growth(
    checkpoint: Path, *, batch_size: int, num_requests: int, num_threads: int
) -> dict[str, Any]:
    """Time outside forward and sampling, per step, in each quarter of many short requests."""
    core = make_core(
        checkpoint, decodes_audio=False, max_num_seqs=batch_size, cpu_threads=num_threads
    )
    timer = StepTimer(core)
    outside: list[float] = []
    num_added = 0
    with tqdm(total=num_requests, desc="short requests", unit="req") as progress:
        while core.has_work() or num_added < num_requests:
            while core._scheduler.stats().num_waiting < batch_size and num_added < num_requests:
                request = make_request(
                    str(num_added),
                    num_frames=_SHORT_FRAMES,
                    prompt_len=_SHORT_PROMPT,
                    seed=num_added,
                )
                core.add_request(request)
                num_added += 1
                progress.update()
            num_rows, seconds = timer.step()
            if num_rows == batch_size:
                outside.append(_outside(seconds))
    core.check_integrity()
    core.shutdown()
    quarter = len(outside) // 4
    quarters = [median(outside[i * quarter : (i + 1) * quarter]) for i in range(4)]
    return {
        "batch_size": batch_size,
        "num_requests": num_requests,
        "num_steps": len(outside),
        "outside_s_by_quarter": quarters,
        "last_over_first": quarters[3] / quarters[0],
    }


def _outside(seconds: dict[str, float]) -> float:
    return sum(seconds[part] for part in _OUTSIDE)


def print_results(splits: Sequence[dict[str, Any]], growth: dict[str, Any] | None) -> None:
    header = ["size", "batch", "step ms", *(f"{part} ms" for part in PARTS), "outside %", "load"]
    rows = [
        [
            split["size"],
            split["batch_size"],
            1e3 * split["step_s"],
            *(1e3 * split["seconds"][part] for part in PARTS),
            100 * split["outside_share"],
            split["load_average"],
        ]
        for split in splits
    ]
    print(format_table(header, rows))
    if growth is not None:
        quarters = ", ".join(f"{1e6 * value:.0f}" for value in growth["outside_s_by_quarter"])
        print(
            f"{growth['num_requests']} short requests, batch {growth['batch_size']}: "
            f"{quarters} us outside forward and sample by quarter, "
            f"last / first = {growth['last_over_first']:.2f}"
        )


def plot(splits: Sequence[dict[str, Any]], file: Path) -> None:
    """Stacked shares of the parts, one bar per size and batch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    labels = [f"{split['size']}\n{split['batch_size']}" for split in splits]
    figure, axes = plt.subplots(figsize=(1.2 * len(splits) + 2, 4))
    bottom = [0.0] * len(splits)
    for part in PARTS:
        shares = [100 * s["seconds"][part] / sum(s["seconds"].values()) for s in splits]
        axes.bar(labels, shares, bottom=bottom, label=part)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.set_ylabel("% of a decode step")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "medium"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--num-steps", type=int, default=40)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument(
        "--num-short-requests", type=int, default=3000, help="0 leaves this part out"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    splits, growth = [], None
    with tempfile.TemporaryDirectory() as name:
        for size in arguments.sizes:
            checkpoint = Path(name) / Path(size).stem
            run_make(checkpoint, layout="transformers", size=size)
            for batch_size in arguments.batch_sizes:
                split = measure_split(
                    checkpoint,
                    size,
                    batch_size,
                    num_steps=arguments.num_steps,
                    num_threads=arguments.num_threads,
                )
                splits.append(split)
        if arguments.num_short_requests:
            growth = measure_growth(
                Path(name) / Path(arguments.sizes[0]).stem,
                batch_size=32,
                num_requests=arguments.num_short_requests,
                num_threads=arguments.num_threads,
            )
    print_results(splits, growth)
    if arguments.json:
        write_json(arguments.json, {"splits": splits, "growth": growth})
    if arguments.plot:
        plot(splits, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
