"""Fetching an address that a client named, without lending it the server's place in the network.

A host's addresses are looked up once, judged, and connected to as they are, so that a second look-up
cannot lead elsewhere. Redirects are not followed. Knows nothing of audio.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import SplitResult, urlsplit

__all__ = ["FetchError", "fetch", "is_public"]

_CHUNK_BYTES = 64 * 1024
_TOO_LATE = "it took too long"
_NAT64 = IPv6Network("64:ff9b::/96")


class FetchError(Exception):
    """Why an address was not fetched, in words for the client."""


def fetch(url: str, *, max_bytes: int, timeout_s: float, allow_private: bool) -> bytes:
    """Body of a GET of an http(s) ``url``.

    Args:
        url: as the client sent it.
        max_bytes: longer bodies are refused.
        timeout_s: for each wait, and for the whole.
        allow_private: also connect to loopback, link-local and private addresses.

    Raises:
        FetchError: the URL is wrong, leads where it may not, or does not answer with 200.
    """
    deadline = time.monotonic() + timeout_s
    parts = _parse(url)
    addresses = _resolve(parts, allow_private=allow_private)
    stream = _connect(parts, addresses, deadline)
    # A server that sends a byte now and then would outlast every single wait.
    last_moment = threading.Timer(max(0.0, deadline - time.monotonic()), _break_off, (stream,))
    last_moment.daemon = True
    last_moment.start()
    try:
        connection = _greet(parts, stream)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "*/*"})
        return _read(connection.getresponse(), max_bytes, deadline)
    except (OSError, HTTPException, ValueError) as error:
        is_late = time.monotonic() >= deadline
        raise FetchError(_TOO_LATE if is_late else f"the connection failed: {error}") from error
    finally:
        last_moment.cancel()
        stream.close()


def is_public(text: str) -> bool:
    """Whether an IP address belongs to the public network, also one that wraps an IPv4 address."""
    address: IPv4Address | IPv6Address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address.sixtofour or address.teredo or address in _NAT64:
            return False  # leads to an IPv4 address by way of a gateway
    return address.is_global and not address.is_multicast


def _parse(url: str) -> SplitResult:
    if not url.isascii() or any(char <= " " for char in url):
        raise FetchError("the URL holds blanks, control characters or letters beyond ASCII")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise FetchError(f"the URL is wrong: {error}") from error
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname or port == 0:
        raise FetchError("the URL must be http(s)://HOST/...")
    if "@" in parts.netloc or "\\" in url:
        raise FetchError("the URL must name no user and hold no backslash")
    return parts


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme.lower() == "https" else 80)


def _resolve(parts: SplitResult, *, allow_private: bool) -> list[str]:
    """Addresses of the host; all of them must be allowed."""
    assert parts.hostname, "a parsed URL has a host"
    try:
        found = socket.getaddrinfo(parts.hostname, _port(parts), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchError(f"the host {parts.hostname!r} has no address") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allow_private and not all(is_public(address) for address in addresses):
        raise FetchError(f"the host {parts.hostname!r} is not on the public network")
    return addresses


def _connect(parts: SplitResult, addresses: list[str], deadline: float) -> socket.socket:
    """A connection to the first address that answers; nothing has been said over it."""
    problem: OSError | None = None
    for address in addresses:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise FetchError(_TOO_LATE) from problem
        try:
            stream = socket.create_connection((address, _port(parts)), timeout=left_s)
        except OSError as error:
            problem = error
            continue
        if parts.scheme.lower() == "http":
            return stream
        context = ssl.create_default_context()
        return context.wrap_socket(
            stream, server_hostname=parts.hostname, do_handshake_on_connect=False
        )
    raise FetchError(f"the connection failed: {problem}") from problem


def _greet(parts: SplitResult, stream: socket.socket) -> HTTPConnection:
    """HTTP over ``stream``, after the handshake of TLS; the host is named to it as in the URL."""
    assert parts.hostname, "a parsed URL has a host"
    kind: type[HTTPConnection] = HTTPConnection
    if isinstance(stream, ssl.SSLSocket):
        stream.do_handshake()
        kind = HTTPSConnection
    connection = kind(parts.hostname, _port(parts))
    connection.sock = stream
    return connection


def _break_off(stream: socket.socket) -> None:
    """End the waits of another thread on this connection."""
    with contextlib.suppress(OSError):  # it is closed
        socket.socket.shutdown(stream, socket.SHUT_RDWR)  # that of TLS would change its state


def _read(reply: HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    if reply.status != 200:
        raise FetchError(f"it answered with status {reply.status}; redirects are not followed")
    data = bytearray()
    while chunk := reply.read1(_CHUNK_BYTES):
        data += chunk
        if len(data) > max_bytes:
            raise FetchError(f"it is larger than {max_bytes} bytes")
    if time.monotonic() >= deadline:
        raise FetchError(_TOO_LATE)
    if reply.length:
        raise FetchError(f"it broke off {reply.length} bytes before its end")
    if not data:
        raise FetchError("it is empty")
    return bytes(data)
