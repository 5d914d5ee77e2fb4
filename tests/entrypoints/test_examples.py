"""The programs of ``examples/``, each run as it stands against a live server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import pytest

from vllm.entrypoints.bosonai.voices import SHIPPED_PRESETS, VoiceLibrary

HOP = 960  # samples of a frame of the stand-in engine, which makes two frames for each character


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def samples_of(text: str) -> int:
    return 2 * len(text) * HOP


def test_python_speech(live: Any, repo_root: Path, tmp_path: Path) -> None:
    program = repo_root / "examples" / "openai_speech.py"
    output = run(sys.executable, str(program), f"{live.url}/v1", folder=tmp_path)
    assert "seed 42" in output
    assert (tmp_path / "speech.mp3").read_bytes().startswith(b"\xff\xf3")


def test_python_streaming(live: Any, repo_root: Path, tmp_path: Path) -> None:
    program = repo_root / "examples" / "openai_streaming.py"
    output = run(sys.executable, str(program), f"{live.url}/v1", folder=tmp_path)
    assert "first audio after" in output
    assert "output tokens" in output
    with wave.open(str(tmp_path / "speech.wav")) as file:
        assert file.getnframes() == samples_of(live.engine.seen[-1][0].text)
    assert (tmp_path / "speech.opus").read_bytes().startswith(b"OggS")


def test_curl(live: Any, repo_root: Path, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    output = run(str(repo_root / "examples" / "speech.sh"), live.url, folder=tmp_path)
    assert '"en_woman"' in output
    assert (tmp_path / "speech.mp3").read_bytes().startswith(b"\xff\xf3")
    size = (tmp_path / "speech.pcm").stat().st_size
    assert size == 2 * samples_of(live.engine.seen[-1][0].text)


@pytest.fixture
def keeper(start_server: Any, tmp_path: Path) -> Any:
    """A server that keeps voices, before the fake engine."""
    server = start_server(None, "--voice-store", str(tmp_path / "voices"))
    server.engine.voices = VoiceLibrary.for_engine(server.engine.info, store=server.engine.store)
    return server


CLIP = SHIPPED_PRESETS / "en_man.wav"


def test_python_voices(keeper: Any, repo_root: Path, tmp_path: Path) -> None:
    program = repo_root / "examples" / "openai_voices.py"
    arguments = (str(CLIP), "What the clip says.", f"{keeper.url}/v1")
    output = run(sys.executable, str(program), *arguments, folder=tmp_path)
    assert output.startswith("made My_own_voice\n")
    assert output.endswith("in the voice My_own_voice\ndeleted My_own_voice\n")
    assert (tmp_path / "voice.mp3").read_bytes().startswith(b"\xff\xf3")
    assert keeper.engine.store.voices() == []


def test_curl_voices(keeper: Any, repo_root: Path, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    program = repo_root / "examples" / "voices.sh"
    output = run(str(program), str(CLIP), 'He said "so".', keeper.url, folder=tmp_path)
    made, _, deleted = output.splitlines()
    assert json.loads(made)["id"] == "my_voice"
    assert json.loads(deleted)["deleted"] is True
    assert (tmp_path / "voice.mp3").read_bytes().startswith(b"\xff\xf3")
    assert [each[0].voice.voice_id for each in keeper.engine.seen if each[0].text != "a"] == [
        "my_voice"
    ]


def test_javascript(live: Any, installed_javascript: Path) -> None:
    output = run("node", "speech.mjs", f"{live.url}/v1", folder=installed_javascript)
    assert "speech.mp3, seed 42" in output
    assert "24000 Hz" in output
    data = (installed_javascript / "speech.mp3").read_bytes()
    assert data.startswith(b"\xff\xf3")
    size = (installed_javascript / "speech.pcm").stat().st_size
    assert size == 2 * samples_of(live.engine.seen[-1][0].text)


def test_every_example_is_run_here(repo_root: Path) -> None:
    examples = {p for p in (repo_root / "examples").rglob("*") if "node_modules" not in p.parts}
    programs = {p.name for p in examples if p.suffix in {".py", ".sh", ".mjs"}}
    tests = Path(__file__).read_text(encoding="utf-8")
    assert programs
    assert not [name for name in programs if f'"{name}"' not in tests]
