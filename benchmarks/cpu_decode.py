"""A decode step on the CPU, native against torch, in one interleaved run.

A step is what the runner does for all rows: embedding, layers, heads, sampling with the default
settings, streams' state. The engines are equal but for who takes the step; each gets the same
prompts, and is timed at its first steps over and over, so contexts do not grow. A format is that of
the native weights, with ``/`` and that of keys and values where it is not what follows from them.

    python -m benchmarks.cpu_decode
    python -m benchmarks.cpu_decode --clock thread --formats float32 int8 int8/bfloat16
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks._engine import make_core, make_request
from benchmarks._report import format_table, write_json
from benchmarks._timing import CLOCKS, interleave, ratio
from vllm.checkpoint_config import HiggsAudioConfig
from vllm.checkpoints import run_make
from vllm.checkpoints.make_model import make_model
from vllm.kernels import native
from vllm.v1.core.sched_output import StepKind
from vllm.v1.engine.core import EngineCore

# Of an engine with such weights; whatever is not here is a quantisation.
_OPTIONS: dict[str, dict[str, str]] = {
    "torch": {},
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
}


class Stepper:
    """Rows in the middle of their utterances, whose next step can be taken again and again."""

    def __init__(self, checkpoint: Path, path: str, batch_size: int, num_threads: int) -> None:
        self._is_native = path != "torch"
        with self._switch():
            self._core = make_core(
                checkpoint,
                decodes_audio=False,
                max_num_seqs=batch_size,
                cpu_threads=num_threads,
                **_options_of(path),
            )
            self._runner = self._core._executor._worker._runner  # type: ignore[attr-defined]
            self._decoder = self._runner._decoder
            assert (self._decoder._native_step is not None) == self._is_native
            self._batch = self._runner._prepare_decode(_start(self._core, batch_size))

    @torch.inference_mode()
    def step(self) -> None:
        if self._is_native:
            self._decoder._native_step(self._batch.rows)
            return
        with self._switch():
            self._decoder._step(self._batch.rows)

    def num_weight_bytes(self) -> tuple[int, int]:
        """Bytes of matrices that a native step of one row reads: of its layers, and of the head."""
        weights, _ = self._decoder._native_step._kept
        layers = sum(
            matrix.num_bytes
            for layer in weights.layers
            for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down)
        )
        return layers, weights.head.num_bytes

    def shutdown(self) -> None:
        self._core.shutdown()

    def _switch(self) -> Any:
        return nullcontext() if self._is_native else native.disabled()


def _options_of(path: str) -> dict[str, str]:
    """Engine options for a format of weights and, behind a slash, of pages."""
    weights, _, pages = path.partition("/")
    options = _OPTIONS.get(weights, {"quantization": weights})
    return options | {"kv_cache_dtype": pages or "auto"}


def _start(core: EngineCore, batch_size: int) -> tuple[str, ...]:
    """Bring as many requests as there are rows to decode; their ids."""
    for index in range(batch_size):
        core.add_request(make_request(str(index), num_frames=400, seed=index))
    plans: list[Any] = []
    schedule = core._scheduler.schedule
    core._scheduler.schedule = lambda: plans.append(schedule()) or plans[-1]  # type: ignore
    while not plans or plans[-1].step_kind is not StepKind.DECODE:
        core.step()
    while len(plans[-1].decode) < batch_size:
        core.step()
    ids: tuple[str, ...] = plans[-1].decode
    return ids


def measure(
    checkpoint: Path,
    batch_size: int,
    paths: Sequence[str],
    *,
    num_rounds: int,
    num_threads: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Median seconds of a step on each path, and the ratio of torch's to it."""
    steppers = {path: Stepper(checkpoint, path, batch_size, num_threads) for path in paths}
    rivals = {path: stepper.step for path, stepper in steppers.items()}
    seconds = interleave(rivals, num_rounds=num_rounds, title=f"batch {batch_size}", clock=clock)
    for stepper in steppers.values():
        stepper.shutdown()
    return {
        "batch_size": batch_size,
        "num_threads": num_threads,
        "load_average": os.getloadavg()[0],
        "seconds": {path: median(values) for path, values in seconds.items()},
        "ratio": {path: ratio(seconds["torch"], values) for path, values in seconds.items()},
    }


def make_checkpoint(folder: Path, size: str, num_layers: int) -> None:
    """A size with another number of layers, and its codec."""
    run_make(folder, layout="transformers", size=size)
    plain = HiggsAudioConfig.from_folder(folder / "lm")
    config = replace(plain, num_hidden_layers=num_layers)
    make_model(folder / "lm", layout="transformers", config=config)


def print_results(results: Sequence[dict[str, Any]]) -> None:
    paths = list(results[0]["seconds"])
    header = ["batch", *(f"{path} ms" for path in paths), *(f"x {path}" for path in paths[1:])]
    rows = [
        [
            each["batch_size"],
            *(1e3 * each["seconds"][path] for path in paths),
            *(each["ratio"][path] for path in paths[1:]),
            each["load_average"],
        ]
        for each in results
    ]
    print(format_table([*header, "load"], rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--formats", nargs="+", default=["float32"], help="native weights, or weights/pages"
    )
    parser.add_argument("--size", default="tiny", help="of the layers, see vllm checkpoint make")
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--num-rounds", type=int, default=100)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="thread: CPU time of one thread, on a machine that others use",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if native.loaded_library() is None:
        parser.error("the native library is not built")
    with tempfile.TemporaryDirectory() as name:
        make_checkpoint(Path(name), arguments.size, arguments.num_layers)
        results = [
            measure(
                Path(name),
                batch_size,
                ["torch", *arguments.formats],
                num_rounds=arguments.num_rounds,
                num_threads=arguments.num_threads,
                clock=CLOCKS[arguments.clock],
            )
            for batch_size in arguments.batch_sizes
        ]
    print_results(results)
    if arguments.json:
        write_json(arguments.json, {"results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
