"""Matrix products on the CPU: native in each format against torch's packed float32.

Weights are so many copies that they fit into no cache (``--where memory``) or stay in one
(``--where cache``), and are gone through in turn, as the layers of a model are. Next to each
time are operations a second, bytes of weights a second, and that as a share of what plain reading
of memory reaches in the same run.

    python -m benchmarks.cpu_linear
    python -m benchmarks.cpu_linear --shapes 5120x3072 --where memory --rows 1 8 --json out.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks._report import format_table, write_json
from benchmarks._timing import CLOCKS, interleave, ratio
from vllm.kernels import native
from vllm.kernels.linear import linear, pack_weight
from vllm.kernels.packed_linear import PACKED_FORMATS, PackedMatrix
from vllm.kernels.quantize import QuantizedWeight, WeightFormat, quantize

NUM_BYTES = {"cache": 4 << 20, "memory": 512 << 20}  # of float32 weights
HEADER = ["format", "us", "GFLOP/s", "GB/s", "of reading", "torch / ours"]


def measure(
    shape: tuple[int, int],
    num_rows: int,
    *,
    where: str,
    num_rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """One line for each format, torch's float32 first."""
    num_copies = max(1, NUM_BYTES[where] // (shape[0] * shape[1] * 4))
    torch.manual_seed(0)
    weight = torch.randn(shape) / shape[1] ** 0.5
    x = torch.randn(num_rows, shape[1])
    packed = [pack_weight(weight.clone()) for _ in range(num_copies)]
    num_bytes = {"torch float32": weight.nbytes}
    rivals: dict[str, Callable[[], object]] = {
        "torch float32": lambda: [linear(x, each, 1) for each in packed],
        "reading": _reader(where),
    }
    for weight_format in PACKED_FORMATS:
        matrices = [PackedMatrix(in_format(weight, weight_format)) for _ in range(num_copies)]
        num_bytes[str(weight_format)] = matrices[0].num_bytes
        rivals[str(weight_format)] = lambda each=matrices: [matrix(x) for matrix in each]
    title = f"{shape[0]}x{shape[1]}, {num_rows}"
    seconds = interleave(rivals, num_rounds=num_rounds, title=title, clock=clock)
    reading = NUM_BYTES[where] / median(seconds["reading"])
    lines = []
    for name, size in num_bytes.items():
        each = median(seconds[name]) / num_copies
        lines.append(
            {
                "format": name,
                "shape": list(shape),
                "num_rows": num_rows,
                "where": where,
                "num_threads": torch.get_num_threads(),
                "us": each * 1e6,
                "gflops": 2 * shape[0] * shape[1] * num_rows / each / 1e9,
                "gb_per_s": size / each / 1e9,
                "share_of_reading": size / each / reading,
                "ratio": ratio(seconds["torch float32"], seconds[name]),
            }
        )
    return lines


def in_format(weight: Tensor, weight_format: WeightFormat) -> Tensor | QuantizedWeight:
    """``weight`` as the native library takes it."""
    if weight_format is WeightFormat.FLOAT32:
        return weight
    if weight_format is WeightFormat.BFLOAT16:
        return weight.bfloat16()
    return quantize(weight, weight_format)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if native.loaded_library() is None:
        print("there is no native library here; see docs/kernels.md")
        return 1
    torch.set_num_threads(arguments.num_threads)
    results = []
    for where in arguments.where:
        for shape in arguments.shapes:
            for num_rows in arguments.rows:
                lines = measure(
                    shape,
                    num_rows,
                    where=where,
                    num_rounds=arguments.num_rounds,
                    clock=CLOCKS[arguments.clock],
                )
                results += lines
                print(
                    f"\n{shape[0]} x {shape[1]}, {num_rows} rows, weights in {where}, "
                    f"{arguments.num_threads} threads, {native.isa()}"
                )
                print(format_table(HEADER, [_cells(line) for line in lines]))
    if arguments.json is not None:
        write_json(arguments.json, {"isa": native.isa(), "results": results})
    return 0


def _reader(where: str) -> Callable[[], object]:
    """Reads as many bytes as float32 weights have, as fast as torch can."""
    held = torch.ones(NUM_BYTES[where] // 4)
    return held.sum


def _cells(line: dict[str, Any]) -> list[object]:
    keys = ("format", "us", "gflops", "gb_per_s", "share_of_reading", "ratio")
    return [line[key] for key in keys]


def _shape(text: str) -> tuple[int, int]:
    outputs, _, inputs = text.partition("x")
    return int(outputs), int(inputs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Matrix products on the CPU, native against torch."
    )
    parser.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        default=[(512, 256), (2048, 256), (256, 1024), (1024, 1024)],
        metavar="OUTPUTSxINPUTS",
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--where", choices=tuple(NUM_BYTES), nargs="+", default=["cache"])
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--num-rounds", type=int, default=15)
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="thread: CPU time of one thread, on a machine that others use",
    )
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
