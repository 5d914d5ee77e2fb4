"""``vllm voices``: the voices of a presets folder, without an engine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.entrypoints.bosonai.voices import OPENAI_VOICE_ALIASES, VoiceLibrary
from vllm.entrypoints.cli_args import normalize_flags

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Print one line per voice, then the aliases."""
    parser = argparse.ArgumentParser(prog="vllm voices", allow_abbrev=False)
    parser.add_argument(
        "--voice-presets-dir",
        type=Path,
        metavar="DIR",
        help="folder with config.json and clips; default: the shipped voices",
    )
    arguments = parser.parse_args(normalize_flags(argv))
    library = VoiceLibrary.without_engine(arguments.voice_presets_dir)
    entries = library.list()
    for entry in entries:
        print(_line(entry))
    ids = {entry["id"] for entry in entries}
    aliases = [
        f"{alias} = {voice}" for alias, voice in OPENAI_VOICE_ALIASES.items() if voice in ids
    ]
    if aliases:
        print(f"aliases: {', '.join(aliases)}")
    return 0


def _line(entry: dict[str, Any]) -> str:
    mark = "*" if entry["default"] else " "
    clip = f"{entry['duration']:5.1f} s" if entry["duration"] else "no clip"
    return f"{mark} {entry['id']:<16} {entry['language']:<3} {clip:<8} {entry['description']}"
