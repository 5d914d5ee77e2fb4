"""Imports point one way: a module uses its own folder and lower levels only.

The rule is that of ``docs/architecture.md``. It is checked on the syntax trees, so nothing is
imported here. Names under ``TYPE_CHECKING`` are free; imports inside functions must keep the rule
too, except in the modules whose task is to load others late.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The longest prefix of a module's name that stands here decides its level.
LEVELS = {
    "vllm.envs": 0.0,
    "vllm.exceptions": 0.0,
    "vllm.logger": 0.0,
    "vllm.config": 0.0,
    "vllm.sampling_params": 0.0,
    "vllm.outputs": 0.0,
    "vllm.player": 0.0,
    "vllm.seeds": 0.0,
    "vllm.checkpoint_config": 0.0,
    "vllm.audio": 1.0,
    "vllm.prompts": 1.0,
    "vllm.platforms": 1.0,
    "vllm.kernels": 1.0,
    "vllm.forward_context": 1.0,
    "vllm.benchmarks": 1.1,
    "vllm.model_executor": 2.0,
    "vllm.model_executor.layers": 2.1,
    "vllm.model_executor.framing": 2.1,
    "vllm.model_executor.heads": 2.2,
    "vllm.model_executor.codecs": 2.2,
    "vllm.model_executor.models": 2.3,
    "vllm.checkpoints": 2.5,
    "vllm.v1": 3.0,
    "vllm.v1.core": 3.1,
    "vllm.v1.sample": 3.1,
    # The boundary of the engine: plain values that the scheduler and the clients both speak.
    "vllm.v1.engine.messages": 3.05,
    "vllm.v1.metrics": 3.06,
    "vllm.v1.worker": 4.0,
    "vllm.v1.executor": 5.0,
    "vllm.v1.engine": 6.0,
    "vllm.entrypoints": 7.0,
}
# Their task is to load something late: the package's public names, registries, programs.
LAZY = {
    "vllm",
    "vllm.model_executor.models.registry",
    "vllm.model_executor.codecs.registry",
    "vllm.v1.executor.abstract",
    "vllm.v1.engine.core_client",
    "vllm.entrypoints.cli",
    "vllm.entrypoints.llm",
}
NO_TORCH = (
    "vllm.audio",
    "vllm.benchmarks",
    "vllm.checkpoint_config",
    "vllm.config",
    "vllm.entrypoints",
    "vllm.envs",
    "vllm.exceptions",
    "vllm.logger",
    "vllm.outputs",
    "vllm.player",
    "vllm.prompts",
    "vllm.sampling_params",
    "vllm.seeds",
    "vllm.v1.core",
    "vllm.v1.engine",
    "vllm.v1.metrics",
    "vllm.v1.request",
)
# What the HTTP process is made of, below the entrypoints themselves.
SERVER_SIDE = (
    "vllm.audio",
    "vllm.prompts",
    "vllm.v1.engine",
    "vllm.v1.metrics",
)
# Entrypoints that are no server: the commands, each in a process of its own, and the offline engine.
OWN_PROCESS = ("vllm.entrypoints.cli", "vllm.entrypoints.llm")


class Import(NamedTuple):
    source: str
    target: str
    line: int
    is_late: bool  # inside a function

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "vllm").rglob("*.py"))}


def imports_of(name: str) -> Iterator[Import]:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    yield from _walk(name, tree, is_late=False)


def _walk(name: str, node: ast.AST, *, is_late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for statement in child.orelse:
                yield from _walk(name, statement, is_late=is_late)
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            for target in _targets(child):
                yield Import(name, target, child.lineno, is_late)
        inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(name, child, is_late=is_late or inner)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0, "relative imports hide the direction"
    for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield full if full in MODULES else str(node.module)


def area_of(name: str) -> str:
    """Longest prefix of ``name`` in the table of levels."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in LEVELS:
            return prefix
    raise AssertionError(f"{name} has no level; give it one here and in docs/architecture.md")


def is_ours(name: str) -> bool:
    return name.startswith("vllm.")


def is_below(name: str, areas: tuple[str, ...]) -> bool:
    return any(name == area or name.startswith(area + ".") for area in areas)


ALL_IMPORTS = [found for name in MODULES for found in imports_of(name)]


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"vllm"}))
def test_every_module_has_a_level(name: str) -> None:
    assert area_of(name) in LEVELS


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in MODULES.values()}
    missing = [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()]
    assert not missing


def test_imports_point_down() -> None:
    wrong = []
    for found in ALL_IMPORTS:
        if found.source == "vllm" or not is_ours(found.target):
            continue
        if found.is_late and is_below(found.source, tuple(LAZY)):
            continue
        source, target = area_of(found.source), area_of(found.target)
        if source == target or LEVELS[source] == LEVELS[target] == 0:
            continue
        if LEVELS[target] >= LEVELS[source]:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_worker_knows_of_the_core_only_what_crosses() -> None:
    wrong = [
        str(found)
        for found in ALL_IMPORTS
        if is_below(found.source, ("vllm.v1.worker",))
        and is_below(found.target, ("vllm.v1.core",))
        and found.target != "vllm.v1.core.sched_output"
    ]
    assert not wrong, "\n".join(wrong)


def test_server_side_uses_only_the_engines_face() -> None:
    wrong = [
        str(found)
        for found in ALL_IMPORTS
        if is_below(found.source, ("vllm.entrypoints",))
        and not is_below(found.source, OWN_PROCESS)
        and is_ours(found.target)
        and not is_below(found.target, ("vllm.entrypoints", *SERVER_SIDE))
        and LEVELS[area_of(found.target)] > 0
    ]
    assert not wrong, "\n".join(wrong)


def test_light_modules_do_not_import_torch() -> None:
    wrong = [
        str(found)
        for found in ALL_IMPORTS
        if is_below(found.source, NO_TORCH)
        and found.target.partition(".")[0] in {"torch", "transformers"}
        and not (found.is_late and is_below(found.source, tuple(LAZY)))
    ]
    assert not wrong, "\n".join(wrong)


def test_package_itself_imports_nothing_of_its_own_at_once() -> None:
    assert not [str(f) for f in ALL_IMPORTS if f.source == "vllm" and is_ours(f.target)]


def test_transformers_is_no_runtime_dependency() -> None:
    wrong = [str(f) for f in ALL_IMPORTS if f.target.partition(".")[0] == "transformers"]
    assert not wrong, "\n".join(wrong)
