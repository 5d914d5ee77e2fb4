"""What the documents say is there is there, and the snippets marked ``run`` run.

A fenced block whose info string has the word ``run`` after the language is executed:
```` ```python run ```` or ```` ```bash run ````. The blocks of one document run in order in one
folder, empty at first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")])
TOP_LEVEL = {path.name for path in ROOT.iterdir()}

FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)(?P<target>[^)#\s]+)")
CODE_SPAN = re.compile(r"`(?P<text>[\w.\-/]+)`")


class Snippet(NamedTuple):
    place: str
    language: str
    code: str


def marked_snippets(path: Path) -> list[Snippet]:
    text = path.read_text(encoding="utf-8")
    snippets = []
    for match in FENCE.finditer(text):
        language, *words = match["info"].split() or [""]
        if "run" in words:
            line = text.count("\n", 0, match.start()) + 1
            snippets.append(Snippet(f"{path.name}:{line}", language, match["code"]))
    return snippets


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if marked_snippets(path)], ids=lambda path: path.name
)
def test_marked_snippets_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The documented commands are those of the environment that runs the tests, its `vllm` included.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for snippet in marked_snippets(path):
        result = run(snippet, tmp_path)
        assert result.returncode == 0, f"{snippet.place}\n{result.stdout}\n{result.stderr}"


def run(snippet: Snippet, folder: Path) -> subprocess.CompletedProcess[str]:
    programs = {
        "python": [sys.executable, "-c", snippet.code],
        "bash": ["bash", "-euo", "pipefail", "-c", snippet.code],
    }
    return subprocess.run(
        programs[snippet.language],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = {match["target"] for match in LINK.finditer(text)}
    broken = sorted(target for target in targets if not (path.parent / target).exists())
    assert not broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    spans = {match["text"] for match in CODE_SPAN.finditer(path.read_text(encoding="utf-8"))}
    named = {
        span
        for span in spans
        if not span.startswith("/") and span.partition("/")[0] in TOP_LEVEL and span != "vllm"
    }
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing


def test_readme_marks_a_python_and_a_shell_snippet() -> None:
    languages = {snippet.language for snippet in marked_snippets(ROOT / "README.md")}
    assert languages == {"python", "bash"}
