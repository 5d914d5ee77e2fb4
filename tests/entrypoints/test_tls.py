"""TLS as the flags ask for it, with certificates made for the test."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import uvicorn

from vllm.entrypoints.bosonai.api_server import _uvicorn_config, build_app
from vllm.entrypoints.bosonai.engine_host import EngineHost
from vllm.entrypoints.cli_args import parse_serve_args

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")

LIMIT_S = 100  # bounds a hang


class Pair(NamedTuple):
    """A self-signed certificate and its key."""

    key: str
    certificate: str


@pytest.fixture
def make_pair(tmp_path: Path) -> Any:
    def make(name: str) -> Pair:
        pair = Pair(str(tmp_path / f"{name}.key"), str(tmp_path / f"{name}.pem"))
        subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        files = ["-keyout", pair.key, "-out", pair.certificate]
        command = ["openssl", "req", *kind, *files, *subject]
        subprocess.run(command, check=True, capture_output=True)
        return pair

    return make


@contextlib.contextmanager
def serve(engine: Any, pair: Pair, *flags: str) -> Iterator[int]:
    """A server with TLS on a port of its own."""
    own = ["--ssl-keyfile", pair.key, "--ssl-certfile", pair.certificate, "--voice-store", "none"]
    args = parse_serve_args([*own, *flags])
    server = uvicorn.Server(_uvicorn_config(build_app(args, EngineHost(engine)), args))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(LIMIT_S)
        listener.close()
    assert not thread.is_alive()


def status_of(port: int, trust: ssl.SSLContext) -> int:
    with httpx.Client(verify=trust, timeout=LIMIT_S) as client:
        return client.get(f"https://localhost:{port}/version").status_code


def test_replies_are_encrypted(fake_engine: Any, make_pair: Any) -> None:
    pair = make_pair("localhost")
    with serve(fake_engine, pair) as port:
        assert status_of(port, ssl.create_default_context(cafile=pair.certificate)) == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{port}/version", timeout=LIMIT_S)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"https://localhost:{port}/version", timeout=LIMIT_S)


def test_clients_show_a_certificate_where_one_is_required(fake_engine: Any, make_pair: Any) -> None:
    pair, client, stranger = make_pair("localhost"), make_pair("client"), make_pair("stranger")
    flags = ("--ssl-ca-certs", client.certificate, "--ssl-cert-reqs", "2")
    with serve(fake_engine, pair, *flags) as port:
        trust = ssl.create_default_context(cafile=pair.certificate)
        with pytest.raises(httpx.TransportError):
            status_of(port, trust)
        trust.load_cert_chain(stranger.certificate, stranger.key)
        with pytest.raises(httpx.TransportError):
            status_of(port, trust)
        trust = ssl.create_default_context(cafile=pair.certificate)
        trust.load_cert_chain(client.certificate, client.key)
        assert status_of(port, trust) == 200


def test_files_that_do_not_fit_each_other_are_refused(
    make_pair: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make_pair("one"), make_pair("other")
    with pytest.raises(SystemExit):
        parse_serve_args(["--ssl-keyfile", one.key, "--ssl-certfile", other.certificate])
    assert f"--ssl-certfile {other.certificate}, --ssl-keyfile {one.key}" in capsys.readouterr().err
