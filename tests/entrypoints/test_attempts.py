"""Fifty attempts to reach files and addresses that are not the client's: none gets through."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm.entrypoints.bosonai.safe_fetch import FetchError, fetch, is_public
from vllm.entrypoints.bosonai.serving_voices import open_store
from vllm.entrypoints.bosonai.voices import VoiceLibrary
from vllm.entrypoints.cli_args import parse_serve_args

SECRET = b"RIFF-not-for-clients"

URLS = (
    "http://127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://127.1:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://0:{port}/",
    "http://0.0.0.0:{port}/",
    "http://[::1]:{port}/",
    "http://[::]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[fe80::1]:{port}/",
    "http://[fc00::1]:{port}/",
    "http://169.254.169.254/latest/meta-data/",
    "http://10.0.0.1:{port}/",
    "http://172.16.0.1:{port}/",
    "http://192.168.0.1:{port}/",
    "http://100.64.0.1:{port}/",
    "http://224.0.0.1:{port}/",
    "http://user@127.0.0.1:{port}/",
    "http://example.com@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@example.com/",
    "http://127.0.0.1:{port}/ HTTP/1.1\r\nX: y",
    "HTTP://127.0.0.1:{port}/",
    "https://127.0.0.1:{port}/",
    "http:///etc/passwd",
    "http://[::1",
    "http://127.0.0.1:99999/",
    "ftp://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/_x",
)
FILES = (
    "file://{folder}/../secret.wav",
    "file://{folder}/%2e%2e/secret.wav",
    "file://{folder}/link.wav",
    "file://{folder}/../in-not/../secret.wav",
    "file://{folder}/",
    "file://{folder}/%00",
    "file://{folder}/" + "a" * 5000,
    "file:///etc/passwd",
    "file:///proc/self/environ",
    "file:///dev/zero",
    "file://otherhost{folder}/mine.wav",
    "FILE:///etc/passwd",
    "{folder}/../secret.wav",
)
VOICE_IDS = (
    "../secret",
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    ".new-draft",
    "a/../../secret",
    "%2e%2e%2fsecret",
    "a\0b",
    "..\\secret",
)


def test_there_are_fifty() -> None:
    assert len(URLS) + len(FILES) + len(VOICE_IDS) >= 50


@pytest.fixture(scope="module")
def canary() -> Iterator[socket.socket]:
    """A listener that nothing may connect to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


@pytest.fixture
def guarded(start_server: Any, tmp_path: Path) -> SimpleNamespace:
    """A server that fetches URLs and reads one folder, beside files that are not for clients."""
    folder, store = tmp_path / "in", tmp_path / "voices"
    folder.mkdir()
    for name in ("secret.wav", "in-not"):
        (tmp_path / name).write_bytes(SECRET)
    (tmp_path / "secret").mkdir()
    record = {"voice_id": "s", "name": "S", "kind": "prompt", "created_at": 1, "version": "1"}
    (tmp_path / "secret" / "voice.json").write_text(json.dumps(record))
    (folder / "mine.wav").write_bytes(SECRET)
    (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
    flags = [
        *("--voice-store", str(store), "--allow-ref-audio-urls"),
        *("--allowed-local-media-path", str(folder)),
    ]
    server = start_server(None, *flags)
    voices = VoiceLibrary.for_engine(
        server.engine.info, store=open_store(parse_serve_args(flags).server)
    )
    server.engine.voices = voices
    return SimpleNamespace(client=server.client, folder=folder, outside=tmp_path)


def test_none_gets_through(guarded: SimpleNamespace, canary: socket.socket) -> None:
    port = canary.getsockname()[1]
    for template in URLS + FILES:
        clip = template.replace("{port}", str(port)).replace("{folder}", str(guarded.folder))
        body = {"input": "a", "ref_audio": clip, "ref_text": "W."}
        reply = guarded.client.post("/v1/audio/speech", json=body)
        assert reply.status_code == 400, (clip[:80], reply.text[:200])
        error = reply.json()["error"]
        assert error["param"] == "ref_audio", clip[:80]
        assert "decoded" not in error["message"], "the file was read"
    for voice in VOICE_IDS:
        spoken = guarded.client.post("/v1/audio/speech", json={"input": "a", "voice": voice})
        assert spoken.status_code == 400, voice
        removed = guarded.client.post("/remove_prompt", json={"prompt_id": voice})
        assert removed.status_code == 404, voice
        form = {"name": voice, "type": "prompt", "prompt": "A voice."}
        assert guarded.client.post("/v1/audio/voices", json=form).status_code < 500
    with pytest.raises(BlockingIOError):
        canary.accept()
    assert sorted(p.name for p in guarded.outside.iterdir()) == [
        *("in", "in-not", "secret", "secret.wav", "voices")
    ]
    assert {p.name for p in (guarded.outside / "secret").iterdir()} == {"voice.json"}


@pytest.mark.parametrize("path", ["..%2f..%2fsecret", "%2e%2e", "..%5csecret", "a%00b"])
def test_deletion_by_path(guarded: SimpleNamespace, path: str) -> None:
    reply = guarded.client.delete(f"/v1/audio/voices/{path}")
    assert reply.status_code in (404, 405)
    assert (guarded.outside / "secret" / "voice.json").exists()


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def test_a_host_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(0, 0, 0, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    with pytest.raises(FetchError, match="public network"):
        fetch("http://rebinding.test/", max_bytes=1, timeout_s=1.0, allow_private=False)


def test_base64_that_spells_a_path_is_only_bytes(guarded: SimpleNamespace) -> None:
    clip = base64.b64encode(b"#EXTM3U\nfile:///etc/passwd\n").decode()
    body = {"input": "a", "ref_audio": clip, "ref_text": "W."}
    reply = guarded.client.post("/v1/audio/speech", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "ref_audio")
