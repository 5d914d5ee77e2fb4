"""Options and markers of the whole suite; builders live beside the tests that use them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption(
        "--weights",
        type=Path,
        metavar="DIR",
        help="folder with the published checkpoints (DIR/lm, DIR/codec); runs the tests marked weights",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not config.getoption("--slow"):
        skips["slow"] = pytest.mark.skip(reason="slow; needs --slow")
    if config.getoption("--weights") is None:
        skips["weights"] = pytest.mark.skip(reason="needs --weights DIR")
    if any("gpu" in item.keywords for item in items) and not _has_gpu():
        skips["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        for marker, skip in skips.items():
            if marker in item.keywords:
                item.add_marker(skip)


def _has_gpu() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def weights_dir(request: pytest.FixtureRequest) -> Path:
    """Folder given with ``--weights``; only for tests marked ``weights``."""
    folder: Path = request.config.getoption("--weights")
    return folder
