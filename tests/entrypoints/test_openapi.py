"""The OpenAPI document is complete, and servers behave as it says under schemathesis' requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import small_server
from vllm.entrypoints.bosonai.api_server import build_app
from vllm.entrypoints.bosonai.engine_host import EngineHost
from vllm.entrypoints.cli_args import parse_serve_args

pytestmark = pytest.mark.timeout(900)  # seconds of work, on a machine that may be busy

SETTINGS = Path(__file__).with_name("schemathesis.toml")
WITHOUT_TOKENIZER = ("--exclude-path-regex", "tokenize")  # the fake engine has none
SPEAKING = {
    "POST /v1/audio/speech",
    "POST /v1/audio/speech/batch",
    "POST /v1/chat/completions",
    "POST /generate",
    "POST /generate/batch",
}


def operations_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


@pytest.fixture
def document(fake_engine: Any) -> dict[str, Any]:
    return build_app(parse_serve_args([]), EngineHost(fake_engine)).openapi()


def test_every_reply_is_described(document: dict[str, Any]) -> None:
    for label, operation in operations_of(document).items():
        for status, reply in operation["responses"].items():
            assert status.isdigit(), label  # no ranges, no default
            assert "X-Request-Id" in reply["headers"], label
            has_body = "content" in reply and reply["content"] != {}
            assert has_body is not (label == "GET /ping" and status in ("200", "204")), label


def test_every_failure_has_the_one_body(document: dict[str, Any]) -> None:
    for label, operation in operations_of(document).items():
        for status, reply in operation["responses"].items():
            if int(status) < 400:
                continue
            (body,) = reply["content"]["application/json"]["schema"].values()
            own = "UnwellReport" if label == "GET /health" else "ErrorBody"
            assert body == f"#/components/schemas/{own}", (label, status)


def test_every_body_has_its_content_types(document: dict[str, Any]) -> None:
    uploads = {"POST /voices", "POST /v1/audio/voices"}
    for label, operation in operations_of(document).items():
        if not label.startswith("POST "):
            assert "requestBody" not in operation, label
            continue
        forms = {"multipart/form-data"} if label in uploads else set()
        assert set(operation["requestBody"]["content"]) == {"application/json"} | forms, label
        assert {"401", "413", "415", "429"} <= set(operation["responses"]), label


def test_what_speaks_says_so(document: dict[str, Any]) -> None:
    operations = operations_of(document)
    speech = operations["POST /v1/audio/speech"]["responses"]["200"]["content"]
    assert {"audio/mpeg", "audio/pcm", "text/event-stream"} <= set(speech)
    for label in SPEAKING:
        names = {parameter["name"] for parameter in operations[label]["parameters"]}
        assert names == {"X-Request-Id", "X-Request-Timeout"}
        assert operations[label]["requestBody"]["content"]["application/json"]["examples"]


def test_keys_are_asked_for_where_there_are_keys(
    document: dict[str, Any], fake_engine: Any
) -> None:
    assert "securitySchemes" not in document["components"]
    app = build_app(parse_serve_args(["--api-key", "k"]), EngineHost(fake_engine))
    operations = operations_of(app.openapi())
    assert operations["GET /health"]["security"] == []
    assert operations["POST /generate"]["security"] == [{"key": []}]


def schemathesis(url: str, folder: Path, *options: str) -> dict[str, Any]:
    """Have schemathesis test a server; returns its report.

    In a process of its own: its pytest plugin and its warnings stay out of this one.
    """
    program = [sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", SETTINGS]
    report = folder / "report.json"
    done = subprocess.run(
        [*program, "run", f"{url}/openapi.json", f"--report-json-path={report}", *options],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def accepted(report: dict[str, Any]) -> set[str]:
    """Operations that took at least one of the requests as good."""
    return {
        label
        for label, phases in report["valid_rates"].items()
        if any(counts["accepted"] for counts in phases.values())
    }


def test_a_fake_engine_behind_every_route(start_server: Any, tmp_path: Path) -> None:
    server = start_server(
        None, "--api-key", "k", "--voice-store", str(tmp_path / "voices"), "--max-body-mib", "1"
    )
    key = ("-H", "Authorization: Bearer k")
    report = schemathesis(server.url, tmp_path, *key, *WITHOUT_TOKENIZER, "-n", "6")
    operations = operations_of(server.client.get("/openapi.json").json())
    assert report["operations"]["tested"] == len(operations) - 2
    assert accepted(report) >= SPEAKING | {"POST /v1/audio/voices"}


@pytest.mark.slow
def test_a_fake_engine_at_length(start_server: Any, tmp_path: Path) -> None:
    server = start_server(None, "--voice-store", str(tmp_path / "voices"), "--max-body-mib", "1")
    schemathesis(server.url, tmp_path, *WITHOUT_TOKENIZER, "-n", "100")


@pytest.mark.parametrize("state", ["loading", "dead"])
def test_a_server_without_an_engine(
    start_server: Any, fake_engine: Any, tmp_path: Path, state: str
) -> None:
    engine = fake_engine()
    if state == "loading":
        engine.may_start.clear()
    server = start_server(engine, wait_ready=state == "dead")
    if state == "dead":
        engine.kill()
        assert server.fatal.wait(100)
    report = schemathesis(server.url, tmp_path, "--phases", "examples,fuzzing", "-n", "3")
    engine.may_start.set()
    assert not accepted(report) & SPEAKING


def test_a_real_engine(tmp_path: Path) -> None:
    flags = ("--device", "cpu", "--voice-store", "none", "--max-audio-seconds", "0.2")
    only = ("--include-path-regex", "/speech|/chat|/generate|tokenize")
    with small_server(*flags) as (url, _):
        report = schemathesis(url, tmp_path, "--phases", "examples,fuzzing", "-n", "8", *only)
    assert accepted(report) == SPEAKING | {"POST /tokenize", "POST /detokenize"}
