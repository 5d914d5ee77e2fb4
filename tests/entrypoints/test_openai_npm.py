"""OpenAI's npm package against the server, over a socket."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm.entrypoints.bosonai.voices import VoiceLibrary
from vllm.exceptions import EngineError

NUM_BYTES = 2 * 12 * 960  # of "Hello." in pcm: two frames for each character
MAGIC = {"mp3": "\xff\xf3", "opus": "OggS", "aac": "\xff\xf1", "flac": "fLaC", "wav": "RIFF"}


@pytest.fixture
def run(installed_javascript: Path) -> Callable[[Any, str], Any]:
    """Runs one case of the program against a server and returns what it saw."""
    source = Path(__file__).with_name("openai_client.mjs")
    program = shutil.copy(source, installed_javascript)  # beside the package it imports

    def run(server: Any, case: str) -> Any:
        done = subprocess.run(
            ["node", str(program), f"{server.url}/v1", case],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    return run


def test_six_formats(live: Any, run: Callable[[Any, str], Any]) -> None:
    seen = run(live, "formats")
    assert set(seen) == {*MAGIC, "pcm"}
    assert seen["pcm"]["size"] == NUM_BYTES
    for name, magic in MAGIC.items():
        assert seen[name]["head"].startswith(magic), name
        assert seen[name]["size"] > 500


def test_streaming(live: Any, run: Callable[[Any, str], Any]) -> None:
    seen = run(live, "streaming")
    assert (seen["size"], seen["type"]) == (NUM_BYTES, "audio/pcm")
    assert seen["events"][0] == "speech.audio.delta"
    assert seen["events"][-1] == "speech.audio.done"


def test_chat(live: Any, run: Callable[[Any, str], Any]) -> None:
    expected = {"finish": "stop", "transcript": "Hello.", "head": "RIFF", "audioTokens": 12}
    assert run(live, "chat") == expected


def test_a_streamed_chat(live: Any, run: Callable[[Any, str], Any]) -> None:
    seen = run(live, "chatStreamed")
    assert len(set(seen.pop("ids"))) == 1
    assert seen == {"transcript": "Hello.", "size": NUM_BYTES, "finish": "stop", "tokens": 20}


def test_voices(start_server: Any, run: Callable[[Any, str], Any], tmp_path: Path) -> None:
    server = start_server(None, "--voice-store", str(tmp_path))
    server.engine.voices = VoiceLibrary.for_engine(server.engine.info, store=server.engine.store)
    seen = run(server, "voices")
    created = seen["created"]
    assert (created["id"], created["name"], created["object"]) == (
        *("Anna_B", "Anna B", "audio.voice"),
    )
    assert seen["voice"] == "Anna_B"
    assert seen["deleted"] == {"id": "Anna_B", "object": "audio.voice.deleted", "deleted": True}
    assert seen["unknown"]["isKind"]
    assert (seen["unknown"]["code"], seen["unknown"]["param"]) == ("voice_not_found", "voice")


def test_errors(start_server: Any, run: Callable[[Any, str], Any]) -> None:
    seen = run(start_server(None, "--api-key", "right"), "errors")
    assert all(error["isKind"] for error in seen.values()), seen
    codes = {name: (error["status"], error["code"]) for name, error in seen.items()}
    assert codes == {
        "model": (404, "model_not_found"),
        "field": (400, "invalid_value"),
        "key": (401, "invalid_api_key"),
    }
    assert seen["field"]["param"] == "speed"


def test_a_failure_is_not_tried_again(
    start_server: Any, fake_engine: Any, run: Callable[[Any, str], Any]
) -> None:
    server = start_server(fake_engine(fail_before=EngineError("always")))
    seen = run(server, "failure")
    assert seen["isKind"]
    assert "always" in seen["message"]
    assert len(server.engine.seen) == 1


def test_a_full_server_is_tried_again(
    start_server: Any, busy_at_first: Any, run: Callable[[Any, str], Any]
) -> None:
    server = start_server(busy_at_first)
    assert run(server, "retry") == {"size": NUM_BYTES}
    assert len(server.engine.seen) == 2
