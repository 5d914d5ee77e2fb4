"""``run.sh``, ``scripts/monitor_gpu.sh`` and the image, with stand-ins for what they call."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HEADER = "timestamp,gpu_name,memory_used_mb,memory_total_mb,gpu_util_pct,mem_util_pct,temp_c"
ROW = "2026/01/31 12:00:00.123, NVIDIA RTX 4090, 17000, 24564, 97, 60, 71"


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def server_flags(repo_root: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Flags that the server would get from run.sh."""
    shutil.copy(repo_root / "run.sh", tmp_path)
    write_program(tmp_path / "scripts" / "install", "exit 0")
    write_program(tmp_path / "scripts" / "in-venv", 'printf "%s\\n" "$@"')

    def run(*flags: str, **variables: str) -> list[str]:
        done = subprocess.run(
            [str(tmp_path / "run.sh"), *flags],
            env={"PATH": "/usr/bin:/bin", **variables},
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
        )
        words = done.stdout.split()
        assert words[:3] == ["python", "-m", "vllm.entrypoints.bosonai.api_server"]
        return words[3:]

    return run


def test_run_without_variables(server_flags: Callable[..., list[str]]) -> None:
    assert server_flags() == ["--host", "0.0.0.0", "--port", "8778"]
    assert server_flags(PORT="", MAX_MODEL_LEN="") == server_flags()


def test_run_takes_its_variables(server_flags: Callable[..., list[str]]) -> None:
    flags = server_flags(PORT="9000", GPU_MEMORY_UTILIZATION="0.85", MAX_MODEL_LEN="4096")
    assert flags == [
        *("--host", "0.0.0.0", "--port", "9000"),
        *("--gpu-memory-utilization", "0.85", "--max-model-len", "4096"),
    ]


def test_flags_win_over_variables(server_flags: Callable[..., list[str]]) -> None:
    from vllm.entrypoints.cli_args import parse_serve_args

    given = ["--port", "1", "--gpu-memory-utilization", "0.5", "--max-model-len", "512"]
    flags = server_flags(*given, PORT="9000", GPU_MEMORY_UTILIZATION="0.85", MAX_MODEL_LEN="4096")
    args = parse_serve_args(flags)
    assert args.server.port == 1
    assert args.engine.cache.gpu_memory_utilization == 0.5
    assert args.engine.model.max_model_len == 512


@pytest.fixture
def monitor(repo_root: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the monitor where only bash's own commands and the given programs exist."""

    def run(*arguments: str, **programs: str) -> subprocess.CompletedProcess[str]:
        for name, text in programs.items():
            write_program(tmp_path / "bin" / name.replace("_", "-"), text)
        return subprocess.run(
            ["/bin/bash", str(repo_root / "scripts" / "monitor_gpu.sh"), *arguments],
            env={"PATH": str(tmp_path / "bin")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    return run


def test_monitor_writes_the_csv_every_two_seconds(
    monitor: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    # The card is there for three looks; the first only asks whether it is.
    counter = 'echo x >>looks; [ "$(wc -l <looks)" -le 3 ] || { echo "lost it" >&2; exit 9; }'
    done = monitor(
        nvidia_smi=f'echo "$@" >arguments; PATH=/usr/bin:/bin; {counter}; echo "{ROW}"',
        sleep="echo $1 >>sleeps",
    )
    lines = (tmp_path / "gpu_monitor.log").read_text(encoding="utf-8").splitlines()
    assert lines == [HEADER, *[ROW.replace(", ", ",")] * 2]
    assert (tmp_path / "sleeps").read_text(encoding="utf-8").split() == ["2", "2"]
    arguments = (tmp_path / "arguments").read_text(encoding="utf-8")
    assert "--format=csv,noheader,nounits" in arguments
    assert arguments.count(",") == len(HEADER.split(",")) - 1 + 2
    assert done.returncode == 1
    assert "the GPU is gone: lost it" in done.stderr


def test_monitor_without_nvidia_smi(
    monitor: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = monitor()
    assert done.returncode == 1
    assert "no GPU" in done.stderr
    assert not (tmp_path / "gpu_monitor.log").exists()


def test_monitor_where_the_driver_finds_no_card(
    monitor: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = monitor("other.log", nvidia_smi="echo No devices were found; exit 6")
    assert done.returncode == 1
    assert "no GPU to watch: No devices were found" in done.stderr
    assert not (tmp_path / "other.log").exists()


def test_monitor_takes_a_file_name(
    monitor: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    monitor("other.log", nvidia_smi=f'echo "{ROW}"', sleep="kill $PPID")
    lines = (tmp_path / "other.log").read_text(encoding="utf-8").splitlines()
    assert lines == [HEADER, ROW.replace(", ", ",")]


@pytest.mark.parametrize(
    ("arguments", "port"),
    [([], 8778), (["--port", "8000"], 8000), (["--port=9000", "--model", "m"], 9000)],
)
def test_the_image_is_asked_for_its_health_on_its_own_port(
    repo_root: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], port: int
) -> None:
    text = (repo_root / "Dockerfile").read_text(encoding="utf-8")
    entrypoint: list[str] = json.loads(re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)[0])
    (check,) = re.findall(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", text, re.MULTILINE)
    python, flag, code = json.loads(check)
    assert (python, flag) == ("python", "-c")
    command_line = "\0".join([*entrypoint, *arguments]) + "\0"

    def read(path: str) -> Any:
        assert path == "/proc/1/cmdline"
        return io.StringIO(command_line)

    asked: list[str] = []
    monkeypatch.setattr(urllib.request, "urlopen", asked.append)
    exec(code, {"open": read})
    assert asked == [f"http://127.0.0.1:{port}/health"]
