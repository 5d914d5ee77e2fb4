"""Which parts start where others are not installed: HTTP and scheduler without torch, engine without HTTP.

Each check runs in a fresh interpreter whose import system refuses the named packages.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PREAMBLE = """
import sys

BLOCKED = {blocked!r}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return None


sys.meta_path.insert(0, Blocker())
"""

SERVER_ONLY = {
    "av",
    "fastapi",
    "huggingface_hub",
    "msgspec",
    "prometheus_client",
    "pydantic",
    "soxr",
    "starlette",
    "tqdm",
    "uvicorn",
    "zmq",
}


def run(code: str, *, blocked: set[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    program = PREAMBLE.format(blocked=blocked) + code
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_the_blocker_blocks(repo_root: Path) -> None:
    result = run("import torch", blocked={"torch"}, cwd=repo_root)
    assert result.returncode == 1
    assert "ModuleNotFoundError" in result.stderr


@pytest.mark.parametrize(
    "module",
    [
        "vllm",
        "vllm.config",
        "vllm.audio",
        "vllm.prompts",
        "vllm.v1.core",
        "vllm.v1.core.scheduler",
        "vllm.v1.engine.async_llm",
        "vllm.entrypoints.openai.protocol",
        "vllm.entrypoints.bosonai.api_server",
        "vllm.entrypoints.cli",
    ],
)
def test_module_imports_where_torch_is_missing(module: str, repo_root: Path) -> None:
    # boto3 is for servers that keep uploaded voices in a bucket.
    blocked = {"torch", "transformers", "boto3", "botocore"}
    result = run(f"import {module}", blocked=blocked, cwd=repo_root)
    assert result.returncode == 0, result.stderr


def test_server_module_loads_no_torch_where_it_is_installed(repo_root: Path) -> None:
    code = (
        "import vllm.entrypoints.bosonai.api_server\n"
        "heavy = {'torch', 'transformers', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = run(code, blocked=set(), cwd=repo_root)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "module",
    [
        "vllm.entrypoints.llm",
        "vllm.v1.core.scheduler",
        "vllm.v1.worker.gpu_model_runner",
        "vllm.v1.engine.core",
        "vllm.model_executor.models.higgs_audio",
        "vllm.model_executor.codecs.higgs",
        "benchmarks.gpu.compile_ahead",
        "benchmarks.invariance",
    ],
)
def test_engine_imports_where_the_server_packages_are_missing(module: str, repo_root: Path) -> None:
    result = run(f"import {module}", blocked=SERVER_ONLY, cwd=repo_root)
    assert result.returncode == 0, result.stderr
