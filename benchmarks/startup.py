"""Start to ready of the server, and resident memory of its two processes.

Starts the server on a free port with the embedded model (or ``--model``), waits for ``/health``
to answer 200, reads the memory of the HTTP process and of its children, and stops it. The first
start writes caches and does not count.

    python -m benchmarks.startup --num-rounds 3 --json out.json
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from tqdm import tqdm

from benchmarks._report import format_table, write_json

_POLL_S = 0.05
_TIMEOUT_S = 120.0
_MIB = 1 << 20
_TARGET_S = 10.0
_TARGET_HTTP_MIB = 200.0


def measure(server_arguments: Sequence[str]) -> dict[str, Any]:
    """One start.

    Raises:
        RuntimeError: the server ended or was not ready in time.
    """
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.bosonai.api_server"]
    command += ["--device", "cpu", "--port", str(port), *server_arguments]
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_ready(server, port, deadline=start + _TIMEOUT_S)
        ready_s = time.perf_counter() - start
        http = psutil.Process(server.pid)
        engine_bytes = [child.memory_info().rss for child in http.children(recursive=True)]
        return {
            "ready_s": ready_s,
            "http_mib": http.memory_info().rss / _MIB,
            "engine_mib": max(engine_bytes, default=0) / _MIB,
            "load_average": os.getloadavg()[0],
        }
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, *, deadline: float) -> None:
    while time.perf_counter() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(_POLL_S)
    raise RuntimeError(f"the server was not ready after {_TIMEOUT_S:.0f} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def print_results(starts: Sequence[dict[str, Any]]) -> None:
    header = ["start", "ready s", "http MiB", "engine MiB", "load"]
    names = ("ready_s", "http_mib", "engine_mib", "load_average")
    rows = [
        [str(index + 2), *(start[name] for name in names)] for index, start in enumerate(starts)
    ]
    rows.append(["median", *(median(start[name] for start in starts) for name in names)])
    print(format_table(header, rows))
    print(f"targets: ready <= {_TARGET_S:g} s, http < {_TARGET_HTTP_MIB:g} MiB")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Other arguments are passed to the server.",
    )
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments, server_arguments = parser.parse_known_args(argv)
    rounds = tqdm(range(arguments.num_rounds + 1), desc="starts", unit="start")
    starts = [measure(server_arguments) for _ in rounds][1:]
    print_results(starts)
    if arguments.json:
        write_json(arguments.json, {"starts": starts})
    return 0


if __name__ == "__main__":
    sys.exit(main())
