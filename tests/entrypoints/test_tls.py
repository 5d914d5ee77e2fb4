"""TLS as the flags ask for it, with a certificate made for the test."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from vllm.entrypoints.bosonai.api_server import _uvicorn_config, build_app
from vllm.entrypoints.bosonai.engine_host import EngineHost
from vllm.entrypoints.cli_args import parse_serve_args


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")
def test_replies_are_encrypted(fake_engine: Any, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", *kind, *files, *subject], check=True, capture_output=True)
    args = parse_serve_args(
        ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--voice-store", "none"]
    )
    server = uvicorn.Server(_uvicorn_config(build_app(args, EngineHost(fake_engine)), args))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        trust = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(verify=trust, timeout=10) as client:
            assert client.get(f"https://localhost:{port}/version").status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{port}/version", timeout=10)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"https://localhost:{port}/version", timeout=10)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
    assert not thread.is_alive()
