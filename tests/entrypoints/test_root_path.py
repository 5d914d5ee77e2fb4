"""``--root-path`` behind a proxy that strips the prefix, as nginx does with ``proxy_pass .../;``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

PREFIX = "/speech/v2"
KEY = {"Authorization": "Bearer one"}
LIMIT_S = 100  # bounds a hang


def make_proxy(upstream: str) -> type[BaseHTTPRequestHandler]:
    """A handler that knows one prefix, takes it off and passes everything else on."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(PREFIX + "/"):
                self.send_error(404)
                return
            size = int(self.headers.get("content-length", 0))
            reply = httpx.request(
                self.command,
                upstream + self.path.removeprefix(PREFIX),
                headers=dict(self.headers.items()),
                content=self.rfile.read(size),
                timeout=LIMIT_S,
            )
            self.send_response(reply.status_code)
            for name, value in reply.headers.items():
                if name not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("content-length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    return Proxy


@pytest.fixture
def behind_proxy(start_server: Any) -> Iterator[Callable[..., httpx.Client]]:
    """Clients of servers behind the proxy."""
    with ExitStack() as stack:

        def start(*flags: str) -> httpx.Client:
            server = start_server(None, "--root-path", PREFIX, *flags)
            proxy = ThreadingHTTPServer(("127.0.0.1", 0), make_proxy(server.url))
            thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(proxy.server_close)
            stack.callback(thread.join, LIMIT_S)
            stack.callback(proxy.shutdown)
            url = f"http://127.0.0.1:{proxy.server_address[1]}{PREFIX}"
            return stack.enter_context(httpx.Client(base_url=url, timeout=LIMIT_S))

        yield start


def test_routes_answer_below_the_prefix(behind_proxy: Callable[..., httpx.Client]) -> None:
    client = behind_proxy()
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").json()["data"][0]["id"] == "tts-test"
    reply = client.post("/v1/audio/speech", json={"input": "Hi.", "response_format": "pcm"})
    assert reply.status_code == 200
    assert len(reply.content) == 3 * 2 * 960 * 2
    form = client.post("/v1/audio/voices", files={"audio_sample": b"x"}, data={"name": "a"})
    assert form.status_code != 415
    assert client.get("/nowhere").status_code == 404


def test_the_description_is_found_and_names_the_prefix(
    behind_proxy: Callable[..., httpx.Client],
) -> None:
    client = behind_proxy()
    document = client.get("/openapi.json").json()
    assert document["servers"] == [{"url": PREFIX}]
    assert "/v1/audio/speech" in document["paths"]
    for page in ("/docs", "/redoc"):
        assert f"{PREFIX}/openapi.json" in client.get(page).text


def test_keys_hold_below_the_prefix(behind_proxy: Callable[..., httpx.Client]) -> None:
    client = behind_proxy("--api-key", "one")
    for path in ("/health", "/ping", "/version", "/metrics", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200, path
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers=KEY).status_code == 200
