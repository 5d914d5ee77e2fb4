"""``vllm checkpoint make`` and ``inspect``: flags for ``vllm.checkpoints``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vllm.checkpoints import run_inspect, run_make

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Make a random checkpoint or report on one; the status is 1 when it has problems."""
    arguments = _parser().parse_args(argv)
    if arguments.action == "make":
        print(
            run_make(
                arguments.out, layout=arguments.layout, size=arguments.size, seed=arguments.seed
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
    inspect = actions.add_parser("inspect", help="layout, sizes, parameter counts, problems")
    inspect.add_argument("folder", type=Path, metavar="DIR")
    return parser
