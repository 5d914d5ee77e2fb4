"""``docs/acceptance.md`` names a test for every point, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
DOCUMENT = TESTS.parent / "docs" / "acceptance.md"
NUM_POINTS = 29


def points() -> dict[str, list[str]]:
    """Title of each point -> the tests that it names."""
    sections = re.split(r"^### ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        section.partition("\n")[0]: re.findall(r"^- `(.+?)`$", section, re.MULTILINE)
        for section in sections
    }


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_point_is_there() -> None:
    numbers = [int(title.partition(".")[0]) for title in points()]
    assert numbers == list(range(1, NUM_POINTS + 1))


@pytest.mark.parametrize(("title", "names"), points().items())
def test_every_point_has_tests_that_exist(title: str, names: list[str]) -> None:
    assert names, title
    assert len(set(names)) == len(names), title
    for name in names:
        path, _, function = name.partition("::")
        assert (TESTS / path).is_file(), name
        assert function in functions_of(path), name
