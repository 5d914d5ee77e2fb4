"""``vllm checkpoint make``, ``quantize`` and ``inspect``: flags for ``vllm.checkpoints``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vllm.checkpoints import run_inspect, run_make, run_quantize

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Make, quantise or report on a checkpoint; the status is 1 when one has problems."""
    arguments = _parser().parse_args(argv)
    if arguments.action == "make":
        print(
            run_make(
                arguments.out, layout=arguments.layout, size=arguments.size, seed=arguments.seed
            )
        )
        return 0
    if arguments.action == "quantize":
        print(
            run_quantize(
                arguments.folder,
                arguments.out,
                quantization=arguments.quantization,
                num_frames=arguments.num_frames,
                seed=arguments.seed,
            )
        )
        return 0
    text, is_sound = run_inspect(arguments.folder)
    print(text)
    return 0 if is_sound else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm checkpoint")
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", help="write a random model, codec and tokenizer")
    make.add_argument("--layout", choices=("boson", "transformers"), default="boson")
    make.add_argument(
        "--size", default="tiny", metavar="SIZE", help="tiny, medium, 3b or a config.json"
    )
    make.add_argument("--seed", type=int, default=0, help="equal seeds give equal files")
    make.add_argument("--out", type=Path, required=True, metavar="DIR")
    quantize = actions.add_parser(
        "quantize", help="write a model with int8 or int4 weights, and how far it is off"
    )
    quantize.add_argument("folder", type=Path, metavar="DIR", help="the model")
    quantize.add_argument("--quantization", choices=("int8", "int4"), default="int8")
    quantize.add_argument("--out", type=Path, required=True, metavar="DIR")
    quantize.add_argument(
        "--num-frames", type=int, default=64, help="frames to compare on; 0 compares nothing"
    )
    quantize.add_argument("--seed", type=int, default=0, help="of the frames to compare on")
    inspect = actions.add_parser("inspect", help="layout, sizes, parameter counts, problems")
    inspect.add_argument("folder", type=Path, metavar="DIR")
    return parser
