"""The ``vllm`` command: one module per subcommand, loaded when it is called.

Knows the names of the subcommands and nothing of what they do.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

import vllm
from vllm.exceptions import HiggsAudioError

__all__ = ["main"]

# name -> (module, what it does)
_COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("vllm.entrypoints.cli.serve", "serve speech over HTTP"),
    "say": ("vllm.entrypoints.cli.say", "speak a text into a file, without a server"),
    "run-batch": ("vllm.entrypoints.cli.run_batch", "speak the lines of a file into another"),
    "voices": ("vllm.entrypoints.cli.voices", "list the voices"),
    "bench": ("vllm.entrypoints.cli.bench", "measure a running speech server"),
    "checkpoint": ("vllm.entrypoints.cli.checkpoint", "make, quantise or inspect a checkpoint"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that the first argument names; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="vllm",
        description="Text to speech over an OpenAI-compatible API.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  vllm {name:<12} {text}" for name, (_, text) in _COMMANDS.items()),
    )
    parser.add_argument("--version", action="version", version=vllm.__version__)
    parser.add_argument("command", choices=tuple(_COMMANDS))
    command = parser.parse_args(words[:1]).command
    module = import_module(_COMMANDS[command][0])
    try:
        return int(module.run(words[1:]))
    except HiggsAudioError as error:
        print(f"vllm {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vllm {command}: stopped", file=sys.stderr)
        return 128 + signal.SIGINT  # as shells tell it
