"""Fetching from servers that send, drip, break off or never say a word."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from vllm.entrypoints.bosonai.safe_fetch import FetchError, fetch

Script = Callable[[socket.socket, threading.Event], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Script], str]]:
    """Servers that play a script to their one client; each is an address with its port."""
    with contextlib.ExitStack() as stack:
        is_over = threading.Event()

        def start(script: Script) -> str:
            listener = socket.create_server(("127.0.0.1", 0))

            def play() -> None:
                peer, _ = listener.accept()
                with peer, contextlib.suppress(OSError):
                    script(peer, is_over)

            thread = threading.Thread(target=play, daemon=True)
            thread.start()
            stack.callback(listener.close)
            stack.callback(thread.join, 100)
            return f"127.0.0.1:{listener.getsockname()[1]}"

        yield start
        is_over.set()


def get(url: str, timeout_s: float = 100.0) -> bytes:
    return fetch(url, max_bytes=1000, timeout_s=timeout_s, allow_private=True)


def say(text: bytes) -> Script:
    return lambda peer, _: (peer.recv(4096), peer.sendall(text))[1]


def drip(head: bytes) -> Script:
    """A byte every 20 ms, for ever."""

    def script(peer: socket.socket, is_over: threading.Event) -> None:
        peer.sendall(head)
        while not is_over.wait(0.02):
            peer.sendall(b"a")

    return script


def test_a_whole_body(serve: Callable[[Script], str]) -> None:
    place = serve(say(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"))
    assert get(f"http://{place}/clip.wav") == b"abc"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "broke off 6 bytes before its end"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "is empty"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 2000, "larger than 1000 bytes"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n", "status 302"),
        (b"SSH-2.0-OpenSSH\r\n", "connection failed"),
    ],
)
def test_what_is_no_body_is_refused(
    serve: Callable[[Script], str], text: bytes, words: str
) -> None:
    with pytest.raises(FetchError, match=words):
        get(f"http://{serve(say(text))}/")


@pytest.mark.parametrize(
    ("scheme", "head"),
    [
        ("http", b""),
        ("http", b"HTTP/1.1 200 OK\r\nX-Long: "),
        ("http", b"HTTP/1.1 200 OK\r\n\r\n"),
        ("https", b"\x16\x03\x03\x40\x00"),
    ],
)
def test_a_server_that_drips_is_left_in_time(
    serve: Callable[[Script], str], scheme: str, head: bytes
) -> None:
    with pytest.raises(FetchError, match="took too long"):
        get(f"{scheme}://{serve(drip(head))}/", timeout_s=0.3)
