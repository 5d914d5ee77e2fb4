"""The engine and the audio code serve every model family, so they name none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FAMILIES = re.compile(r"higgs|orpheus|voxcpm|snac", re.IGNORECASE)
# The distribution's own name and its exception root contain a family's name.
NOT_A_FAMILY = re.compile(r"HiggsAudioError|higgs-audio-vllm")


@pytest.mark.parametrize("folder", ["vllm/v1", "vllm/audio"])
def test_folder_names_no_model_family(repo_root: Path, folder: str) -> None:
    paths = sorted((repo_root / folder).rglob("*.py"))
    assert paths
    found = [
        f"{path.relative_to(repo_root)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if FAMILIES.search(NOT_A_FAMILY.sub("", line)) or FAMILIES.search(path.name)
    ]
    assert not found, "\n".join(found)
