"""``docs/serving.md`` names every route, field, flag, header, status, variable and metric."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from vllm.audio import FORMATS
from vllm.config import EngineConfig
from vllm.entrypoints.bosonai.admission import QUEUE_HEADERS
from vllm.entrypoints.bosonai.api_server import build_app
from vllm.entrypoints.bosonai.engine_host import EngineHost
from vllm.entrypoints.bosonai.proxy_routes import PROXY_HEADERS, GenerateRequest
from vllm.entrypoints.bosonai.response_cache import CACHE_HEADERS
from vllm.entrypoints.bosonai.serving_voices import (
    AddPromptRequest,
    RemovePromptRequest,
    VoiceUpload,
)
from vllm.entrypoints.bosonai.speech_reply import END_HEADERS, START_HEADERS
from vllm.entrypoints.cli_args import (
    IGNORED_FLAGS,
    PARALLEL_SIZES,
    REFUSED_FLAGS,
    parse_serve_args,
)
from vllm.entrypoints.openai import AudioSpeechRequest
from vllm.entrypoints.openai.chat_protocol import ChatCompletionRequest
from vllm.entrypoints.openai.tokenize_protocol import DetokenizeRequest, TokenizeRequest
from vllm.entrypoints.server_config import ServerConfig
from vllm.outputs import FinishReason
from vllm.v1.engine.messages import EngineStats, SchedulerStats
from vllm.v1.metrics import CacheStats, SpeechMetrics


@pytest.fixture(scope="module")
def code_spans(repo_root: Path) -> set[str]:
    """Everything in backticks, and its first word: a flag may be shown with a value."""
    text = (repo_root / "docs" / "serving.md").read_text(encoding="utf-8")
    spans = set(re.findall(r"`([^`\n]+)`", text))
    return spans | {span.split()[0].rstrip(":") for span in spans}


def test_routes(code_spans: set[str], fake_engine: Any) -> None:
    app = build_app(parse_serve_args([]), EngineHost(fake_engine))
    paths = {route.path for route in app.routes if isinstance(route, APIRoute)}
    paths |= {"/docs", "/redoc", "/openapi.json"}
    assert {path.replace(":path", "") for path in paths} <= code_spans


def test_fields(code_spans: set[str]) -> None:
    assert set(AudioSpeechRequest.model_fields) <= code_spans
    assert set(ChatCompletionRequest.model_fields) <= code_spans


@pytest.mark.parametrize("body", [VoiceUpload, AddPromptRequest, RemovePromptRequest])
def test_fields_of_voices(repo_root: Path, body: type[BaseModel]) -> None:
    text = (repo_root / "docs" / "serving.md").read_text(encoding="utf-8")
    assert all(re.search(rf"\b{name}\b", text) for name in body.model_fields)


def test_fields_of_the_proxy(code_spans: set[str]) -> None:
    assert set(GenerateRequest.model_fields) <= code_spans


@pytest.mark.parametrize("body", [TokenizeRequest, DetokenizeRequest])
def test_fields_of_tokens(code_spans: set[str], body: type[BaseModel]) -> None:
    assert set(body.model_fields) <= code_spans


def test_formats(code_spans: set[str]) -> None:
    assert {item for fmt in FORMATS.values() for item in (fmt.name, fmt.media_type)} <= code_spans


def test_headers(code_spans: set[str]) -> None:
    named = {*START_HEADERS, *END_HEADERS, *QUEUE_HEADERS, *PROXY_HEADERS, *CACHE_HEADERS}
    assert {*named, "X-Request-Id", "X-Request-Timeout", "Retry-After"} <= code_spans


def test_finish_reasons(code_spans: set[str]) -> None:
    assert {reason.value for reason in FinishReason} <= code_spans


def test_flags(code_spans: set[str]) -> None:
    parts = (ServerConfig, *get_type_hints(EngineConfig).values())
    fields = {f"--{f.name.replace('_', '-')}" for p in parts for f in dataclasses.fields(p)}
    assert fields | set(IGNORED_FLAGS) | set(REFUSED_FLAGS) <= code_spans


def test_no_flag_is_invented(code_spans: set[str]) -> None:
    parts = (ServerConfig, *get_type_hints(EngineConfig).values())
    known = {f"--{f.name.replace('_', '-')}" for p in parts for f in dataclasses.fields(p)}
    known |= {
        also for p in parts for f in dataclasses.fields(p) for also in f.metadata.get("also", ())
    }
    known |= {*IGNORED_FLAGS, *REFUSED_FLAGS, "--no-...", "--model"}
    known |= {name for names in PARALLEL_SIZES for name in names}
    named = {span for span in code_spans if re.fullmatch(r"--[\w.-]+", span)}
    assert named <= known


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 413, 415, 422, 499, 500, 503])
def test_statuses(repo_root: Path, status: int) -> None:
    assert f"\n| {status} | " in (repo_root / "docs" / "serving.md").read_text(encoding="utf-8")


def test_metrics(code_spans: set[str]) -> None:
    page = (
        SpeechMetrics("m", lambda: EngineStats(SchedulerStats(step_token_counts=(1,))), CacheStats)
        .render()
        .decode()
    )
    names = set()
    for family in text_string_to_metric_families(page):
        names.add(family.name + ("_total" if family.type == "counter" else ""))
    names = {name for name in names if not name.endswith("_created")}
    assert names <= code_spans
