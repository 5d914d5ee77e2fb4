"""``vllm voices``: the voices of a model or of a presets folder, without an engine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.checkpoints.embedded import embedded_checkpoint
from vllm.config import EMBEDDED_MODEL_NAME
from vllm.entrypoints.bosonai.voices import OPENAI_VOICE_ALIASES, VoiceLibrary
from vllm.entrypoints.cli_args import normalize_flags

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Print one line per voice, then the aliases."""
    parser = argparse.ArgumentParser(prog="vllm voices", allow_abbrev=False)
    parser.add_argument(
        "--model", help="Hub id or folder; none is the embedded model, which has its own voices"
    )
    parser.add_argument(
        "--voice-presets-dir",
        type=Path,
        metavar="DIR",
        help="folder with config.json and clips; default: the voices of the model",
    )
    arguments = parser.parse_args(normalize_flags(argv))
    folder = arguments.voice_presets_dir
    own = embedded_checkpoint() / "voices"
    if folder is None and arguments.model in (None, EMBEDDED_MODEL_NAME) and own.is_dir():
        folder = own
    library = VoiceLibrary.without_engine(folder)
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
    return (
        f"{mark} {entry['id']:<16} {entry['language']:<3} {_sound_of(entry):<12} "
        f"{entry['description']}"
    )


def _sound_of(entry: dict[str, Any]) -> str:
    if not entry["speaks"]:
        return "not spoken"
    return f"{entry['duration']:.1f} s clip" if entry["duration"] else "no clip"
