"""The benchmark of pinned voices: its traffic evicts what is not pinned, and only that."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.voice_prefix import SYSTEM_LEN, main


def test_the_pinned_voice_is_found_and_the_other_is_not(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    flags = ["--size", "tiny", "--clip-frames", "60", "--num-rounds", "2"]
    assert main([*flags, "--json", str(target)]) == 0
    result = json.loads(target.read_text(encoding="utf-8"))["result"]
    found = {
        name: {turn["num_cached"] for turn in result[name]} for name in ("pinned", "not pinned")
    }
    assert found == {"pinned": {144}, "not pinned": {SYSTEM_LEN // 16 * 16}}
