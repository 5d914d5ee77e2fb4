"""``docs/serving.md`` names every route, field, flag, header, status, variable and metric, no others."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from vllm import envs
from vllm.audio import FORMATS
from vllm.config import EngineConfig
from vllm.entrypoints.bosonai.api_server import build_app
from vllm.entrypoints.bosonai.engine_host import EngineHost
from vllm.entrypoints.bosonai.middleware import OPEN_PATHS
from vllm.entrypoints.bosonai.proxy_routes import GenerateRequest
from vllm.entrypoints.bosonai.serving_voices import (
    AddPromptRequest,
    RemovePromptRequest,
    VoiceUpload,
)
from vllm.entrypoints.cli_args import (
    IGNORED_FLAGS,
    PARALLEL_SIZES,
    REFUSED_FLAGS,
    parse_serve_args,
)
from vllm.entrypoints.openai import AudioSpeechRequest
from vllm.entrypoints.openai.chat_protocol import ChatCompletionRequest
from vllm.entrypoints.openai.protocol import SamplingOptions
from vllm.entrypoints.openai.reply_docs import ERROR_MEANINGS
from vllm.entrypoints.openai.tokenize_protocol import DetokenizeRequest, TokenizeRequest
from vllm.entrypoints.server_config import ServerConfig
from vllm.outputs import FinishReason
from vllm.v1.engine.messages import EngineStats
from vllm.v1.metrics import CacheStats, SpeechMetrics

MIDDLEWARE_OF_POST = {413, 415, 429}
DOCUMENT_PATHS = {"/docs", "/redoc", "/openapi.json"}


@pytest.fixture(scope="module")
def text(repo_root: Path) -> str:
    return (repo_root / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def named_anywhere(text: str) -> set[str]:
    """Everything in backticks, and its first word: a flag may be shown with a value."""
    found = set(re.findall(r"`([^`\n]+)`", text))
    return found | {span.split()[0].rstrip(":") for span in found}


@pytest.fixture
def operations(fake_engine: Any) -> dict[str, dict[str, Any]]:
    """``METHOD /path`` -> what the OpenAPI document says of it."""
    document = build_app(parse_serve_args([]), EngineHost(fake_engine)).openapi()
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def rows(text: str, heading: str, column: str) -> list[list[str]]:
    """Cells of the first table below a heading whose first column has that title."""
    section = re.split(rf"^#+ {re.escape(heading)}\n", text, maxsplit=1, flags=re.MULTILINE)[1]
    table = re.split(rf"^\| {column} \|.*\n\|[-|]+\|\n", section, maxsplit=1, flags=re.MULTILINE)[1]
    lines = re.match(r"(\|.*\n)*", table)
    assert lines is not None
    return [re.split(r"(?<!\\) ?\| ?", line.strip("| ")) for line in lines[0].splitlines()]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def named(text: str, heading: str, column: str) -> list[str]:
    """Code of the first column of a table."""
    return [span for row in rows(text, heading, column) for span in spans(row[0])]


def test_routes(text: str, operations: dict[str, dict[str, Any]]) -> None:
    table = {
        f"{method} {path}"
        for method, paths, *_ in rows(text, "Routes", "Method")
        for path in spans(paths)
    }
    assert table == set(operations) | {f"GET {path}" for path in DOCUMENT_PATHS}


def test_statuses_of_routes(text: str, operations: dict[str, dict[str, Any]]) -> None:
    table = {
        route: {int(status) for status in statuses.split(", ")}
        for routes, statuses in rows(text, "Errors", "Route")
        for route in spans(routes)
    }
    for label, operation in operations.items():
        method, _, path = label.partition(" ")
        always = set() if path in OPEN_PATHS else {401}
        always |= MIDDLEWARE_OF_POST if method == "POST" else set()
        documented = table.pop(label) | always
        assert documented == {int(status) for status in operation["responses"]}, label
    assert not table


def test_statuses_of_failures(text: str) -> None:
    statuses = [int(row[0]) for row in rows(text, "Errors", "Status")]
    assert statuses == sorted(ERROR_MEANINGS)


def test_fields_of_speech(text: str) -> None:
    fields = named(text, "POST /v1/audio/speech", "Field")
    assert sorted(fields) == sorted(AudioSpeechRequest.model_fields)


def test_fields_of_chat(text: str) -> None:
    taken = set(named(text, "POST /v1/chat/completions", "Field"))
    refusal = text.partition("Fields that only a text answer could honour")[2].partition("\n\n")[0]
    refused = set(spans(refusal))
    assert refused == set(ChatCompletionRequest.inert)
    own = set(ChatCompletionRequest.model_fields) - set(SamplingOptions.model_fields)
    assert taken | refused == own | set(SamplingOptions.inert)


def test_fields_of_the_proxy(text: str) -> None:
    fields = named(text, "Proxy routes", "Field")
    assert sorted(["text", *fields]) == sorted(GenerateRequest.model_fields)


def test_fields_of_uploads(text: str) -> None:
    assert sorted(named(text, "Voices", "Field")) == sorted(VoiceUpload.model_fields)


def test_formats(text: str) -> None:
    table = {spans(name)[0]: spans(kind)[0] for name, kind, *_ in rows(text, "Formats", "Format")}
    assert table == {
        audio_format.name: audio_format.media_type for audio_format in FORMATS.values()
    }


def test_headers(text: str, operations: dict[str, dict[str, Any]]) -> None:
    known = {"X-Accel-Buffering"}  # for proxies, on what is streamed
    for operation in operations.values():
        known |= {parameter["name"] for parameter in operation["parameters"]}
        for reply in operation["responses"].values():
            known |= set(reply["headers"])
    named_here = {span.partition(":")[0] for span in spans(text)}
    for names in (known, named_here):
        names -= {name for name in names if not name.startswith("X-")}
    assert known == named_here


def test_metrics(text: str) -> None:
    stats = EngineStats()
    page = SpeechMetrics("m", lambda: stats, CacheStats).render().decode()
    made = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in text_string_to_metric_families(page)
        if not family.name.endswith("_created")
    }
    table = {spans(name)[0]: kind for name, kind, *_ in rows(text, "Metrics", "Name")}
    assert table == made


def test_variables(text: str) -> None:
    assert sorted(named(text, "Environment", "Variable")) == sorted(envs.names())


@pytest.mark.parametrize("body", [AddPromptRequest, RemovePromptRequest])
def test_fields_of_prompts(text: str, body: type[BaseModel]) -> None:
    assert all(re.search(rf"\b{name}\b", text) for name in body.model_fields)


@pytest.mark.parametrize("body", [TokenizeRequest, DetokenizeRequest])
def test_fields_of_tokens(named_anywhere: set[str], body: type[BaseModel]) -> None:
    assert set(body.model_fields) <= named_anywhere


def test_finish_reasons(named_anywhere: set[str]) -> None:
    assert {reason.value for reason in FinishReason} <= named_anywhere


def test_flags(named_anywhere: set[str]) -> None:
    parts = (ServerConfig, *get_type_hints(EngineConfig).values())
    fields = {f"--{f.name.replace('_', '-')}" for p in parts for f in dataclasses.fields(p)}
    assert fields | set(IGNORED_FLAGS) | set(REFUSED_FLAGS) <= named_anywhere


def test_no_flag_is_invented(named_anywhere: set[str]) -> None:
    parts = (ServerConfig, *get_type_hints(EngineConfig).values())
    known = {f"--{f.name.replace('_', '-')}" for p in parts for f in dataclasses.fields(p)}
    known |= {
        also for p in parts for f in dataclasses.fields(p) for also in f.metadata.get("also", ())
    }
    known |= {*IGNORED_FLAGS, *REFUSED_FLAGS, "--no-...", "--model"}
    known |= {name for names in PARALLEL_SIZES for name in names}
    named = {span for span in named_anywhere if re.fullmatch(r"--[\w.-]+", span)}
    assert named <= known
