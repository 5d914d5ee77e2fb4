"""The share of the memory's bandwidth that a whole native decode step reaches.

Weights exceed the cache, so a step of one row takes as long as reading them, at best. Next to its
time are the bytes of weights it reads a second, as a share of what plain reading reaches in the
same run, and the real-time factor of a model with all its layers, whose steps read more in
proportion. A 3B model's layers are measured two at a time; text is not spoken, so the vocabulary is
a small one.

    python -m benchmarks.cpu_bandwidth
    python -m benchmarks.cpu_bandwidth --clock thread --shapes 3b --formats int8 --json out.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks._report import format_table, write_json
from benchmarks._timing import CLOCKS, interleave, ratio
from benchmarks.cpu_decode import Stepper
from vllm.checkpoint_config import HiggsAudioConfig
from vllm.checkpoints import run_make
from vllm.checkpoints.make_model import make_model
from vllm.kernels import native

FRAME_S = 1 / 25
READ_BYTES = 512 << 20
# Sizes of the network, the layers that it has and those that are measured.
SHAPES: dict[str, tuple[dict[str, int], int, int]] = {
    "medium": (
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
        },
        16,
        16,
    ),
    "3b": (
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        28,
        2,
    ),
}


def make_checkpoint(folder: Path, shape: str) -> None:
    """A random model with the measured layers of a shape, and a codec."""
    sizes, _, num_layers = SHAPES[shape]
    run_make(folder, layout="transformers", size="tiny")
    plain = HiggsAudioConfig.from_folder(folder / "lm")
    config = replace(plain, num_hidden_layers=num_layers, **sizes)
    make_model(folder / "lm", layout="transformers", config=config)


def measure(
    checkpoint: Path,
    shape: str,
    formats: Sequence[str],
    *,
    num_rounds: int,
    num_threads: int,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """One line for each format of weights."""
    steppers = {name: Stepper(checkpoint, name, 1, num_threads) for name in formats}
    torch.set_num_threads(num_threads)
    held = torch.ones(READ_BYTES // 4)
    rivals: dict[str, Callable[[], object]] = {"reading": held.sum}
    rivals |= {name: stepper.step for name, stepper in steppers.items()}
    seconds = interleave(rivals, num_rounds=num_rounds, title=shape, clock=clock)
    lines = []
    for name, stepper in steppers.items():
        layers, head = stepper.num_weight_bytes()
        _, num_layers, num_measured = SHAPES[shape]
        num_bytes = layers + head
        whole = layers * num_layers / num_measured + head
        step_s = median(seconds[name])
        # Of each round, so that drift of the machine cancels out.
        share = ratio(seconds["reading"], seconds[name]) * num_bytes / READ_BYTES
        lines.append(
            {
                "shape": shape,
                "format": name,
                "num_threads": num_threads,
                "load_average": os.getloadavg()[0],
                "num_bytes": num_bytes,
                "step_s": step_s,
                "bytes_per_s": num_bytes / step_s,
                "share_of_reading": share,
                "whole_step_s": step_s * whole / num_bytes,
                "real_time_factor": step_s * whole / num_bytes / FRAME_S,
                "real_time_bytes_per_s": whole / FRAME_S,
            }
        )
        stepper.shutdown()
    return lines


def print_results(lines: Sequence[dict[str, Any]]) -> None:
    header = [
        *("shape, weights", "threads", "MB", "ms", "GB/s", "of reading"),
        *("all layers ms", "RTF", "real time GB/s", "load"),
    ]
    rows = [
        [
            f"{line['shape']}, {line['format']}",
            line["num_threads"],
            line["num_bytes"] / 1e6,
            1e3 * line["step_s"],
            line["bytes_per_s"] / 1e9,
            line["share_of_reading"],
            1e3 * line["whole_step_s"],
            line["real_time_factor"],
            line["real_time_bytes_per_s"] / 1e9,
            line["load_average"],
        ]
        for line in lines
    ]
    print(format_table(header, rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", choices=tuple(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", default=["float32", "int8"], help="of weights")
    parser.add_argument("--num-threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num-rounds", type=int, default=30)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="thread: of one")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if native.loaded_library() is None:
        parser.error("the native library is not built")
    if arguments.clock == "thread" and arguments.num_threads != [1]:
        parser.error("--clock thread counts one thread, so it needs --num-threads 1")
    lines = []
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as name:
            make_checkpoint(Path(name), shape)
            for num_threads in arguments.num_threads:
                lines += measure(
                    Path(name),
                    shape,
                    arguments.formats,
                    num_rounds=arguments.num_rounds,
                    num_threads=num_threads,
                    clock=CLOCKS[arguments.clock],
                )
    print_results(lines)
    if arguments.json:
        write_json(arguments.json, {"results": lines})
    return 0


if __name__ == "__main__":
    sys.exit(main())
