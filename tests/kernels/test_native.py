"""How the native library is found, switched and given threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm.exceptions import ConfigError
from vllm.kernels import native
from vllm.kernels.rms_norm import rms_norm

needs_library = pytest.mark.skipif(
    native.loaded_library() is None, reason="the native library is not built"
)


@pytest.fixture
def reopen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Open the library anew under these variables; gives the line that is logged."""

    def run(**variables: str) -> str:
        for name, value in {"VLLM_NATIVE": "1", **variables}.items():
            monkeypatch.setenv(name, value)
        return native._try_open()[1]

    return run


def test_versions_of_header_and_loader_agree(repo_root: Path) -> None:
    header = (repo_root / "csrc" / "api.h").read_text(encoding="utf-8")
    assert re.findall(r"#define HAV_ABI_VERSION (\d+)", header) == [str(native.ABI_VERSION)]


def test_every_function_of_the_header_has_a_signature(repo_root: Path) -> None:
    header = (repo_root / "csrc" / "api.h").read_text(encoding="utf-8")
    declared = set(re.findall(r"HAV_API [\w ]+\*? ?(hav_\w+)\(", header))
    assert declared == {*native._SIGNATURES, "hav_abi_version"}


@needs_library
def test_switched_off_by_the_environment(reopen: Callable[..., str]) -> None:
    assert reopen(VLLM_NATIVE="0") == "torch, as VLLM_NATIVE=0 says"


def test_where_it_was_not_built(
    reopen: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "_PATH", tmp_path / "libhav.so")
    assert "were not built" in reopen()


def test_a_file_that_is_no_library(
    reopen: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "libhav.so"
    path.write_bytes(b"no library")
    monkeypatch.setattr(native, "_PATH", path)
    assert reopen().startswith("torch, because libhav.so does not load: ")


@needs_library
def test_another_version_is_not_used(
    reopen: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "ABI_VERSION", -1)
    assert re.fullmatch(r"torch, because libhav.so is of version \d+ and not -1", reopen())


@needs_library
def test_instruction_set_from_the_environment(reopen: Callable[..., str]) -> None:
    before, name = native.isa(), native.supported_isas()[0]
    assert before is not None
    assert reopen(VLLM_CPU_ISA=name) == f"native, for {name}"
    native.select_isa(before)


@needs_library
def test_unknown_instruction_set_of_the_environment_is_refused(
    reopen: Callable[..., str],
) -> None:
    with pytest.raises(ConfigError, match="VLLM_CPU_ISA='mmx' is none of "):
        reopen(VLLM_CPU_ISA="mmx")


@needs_library
def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'mmx': here there is .*\w"):
        native.select_isa("mmx")


@needs_library
def test_disabled_is_for_its_block_only() -> None:
    with native.disabled():
        assert native.loaded_library() is None
        assert native.isa() is None
        assert native.supported_isas() == []
    assert native.loaded_library() is not None


@needs_library
def test_pools_follow_torchs_threads() -> None:
    lib = native.loaded_library()
    assert lib is not None
    before = torch.get_num_threads()
    try:
        for num_threads in (3, 2, 1):
            torch.set_num_threads(num_threads)
            assert lib.hav_pool_num_threads(native.pool()) == num_threads
    finally:
        torch.set_num_threads(before)


@needs_library
def test_python_threads_compute_beside_each_other() -> None:
    before = torch.get_num_threads()
    x, weight = torch.randn(64, 700), torch.randn(700)
    expected = rms_norm(x, weight, 1e-5)
    results: list[bool] = []

    def compute() -> None:
        torch.set_num_threads(2)
        results.append(all(torch.equal(rms_norm(x, weight, 1e-5), expected) for _ in range(50)))

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    torch.set_num_threads(before)
    assert results == [True] * 3


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_gets_pools_of_its_own() -> None:
    code = """
import os, torch
from vllm.kernels.rms_norm import rms_norm
torch.set_num_threads(2)
x, weight = torch.randn(64, 700), torch.ones(700)
rms_norm(x, weight, 1e-5)
child = os.fork()
if child == 0:
    rms_norm(x, weight, 1e-5)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


@needs_library
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
@pytest.mark.parametrize("num_cores", [1, 2])
def test_threads_keep_to_the_cores_of_the_process(num_cores: int) -> None:
    cores = sorted(os.sched_getaffinity(0))[:num_cores]
    code = f"""
import os
os.sched_setaffinity(0, {cores})
import torch
from vllm.kernels.rms_norm import rms_norm
torch.set_num_threads(2)
x, weight = torch.randn(64, 700), torch.ones(700)
for _ in range(300):
    rms_norm(x, weight, 1e-5)
threads = [int(name) for name in os.listdir("/proc/self/task")]
print(len(threads) > 1, all(os.sched_getaffinity(each) <= {set(cores)} for each in threads))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"
