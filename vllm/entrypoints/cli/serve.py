"""``vllm serve MODEL``: the server of ``vllm.entrypoints.bosonai.api_server``."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.entrypoints.cli_args import parse_serve_args

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Serve until told to stop."""
    from vllm.entrypoints.bosonai.api_server import run_server

    return run_server(parse_serve_args(argv, prog="vllm serve"))
