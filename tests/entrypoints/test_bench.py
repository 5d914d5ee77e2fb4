"""``vllm bench serve`` against a live server: flags of every spelling, report, files, failures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from vllm.entrypoints.cli import main


def bench(*flags: str) -> int:
    return main(["bench", "serve", *flags])


@pytest.mark.parametrize(
    "spelling",
    [
        ("--url", "--num-requests", "--concurrency"),
        ("--base-url", "--requests", "--concurrent"),
        ("--server", "-n", "-c"),
    ],
)
def test_each_spelling_of_the_flags(
    live: Any, capsys: pytest.CaptureFixture[str], spelling: tuple[str, str, str]
) -> None:
    url, number, concurrency = spelling
    num_before = len(live.engine.seen)
    assert bench(url, live.url, number, "5", concurrency, "2", "--warmup", "1") == 0
    assert len(live.engine.seen) == num_before + 6
    report = capsys.readouterr().out
    assert "5 of 5" in report
    assert "real-time capable: " in report  # yes, unless the machine stands still meanwhile


def test_texts_voice_and_fields_reach_the_server(live: Any, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.write_text("One.\n\nTwo.\n", encoding="utf-8")
    num_before = len(live.engine.seen)
    status = bench(
        *("--url", live.url, "-n", "4", "-c", "1", "--warmup", "0", "--text-file", str(texts)),
        *("--voice", "en_man", "--max-tokens", "40", "--temperature", "0.5"),
        *("--extra-body", '{"instructions": "Calm."}', "--request_rate", "1000"),
    )
    assert status == 0
    seen = live.engine.seen[num_before:]
    assert [prompt.text for prompt, _, _ in seen] == ["One.", "Two.", "One.", "Two."]
    assert {(p.voice.voice_id, p.instructions) for p, _, _ in seen} == {("en_man", "Calm.")}
    assert {(params.max_tokens, params.temperature) for _, params, _ in seen} == {(40, 0.5)}


def test_the_proxy_route(live: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--url", live.url, "--endpoint", "generate", "-n", "4", "-c", "2", "--warmup", "0"]
    assert bench(*flags, "--max-tokens", "300") == 0
    report = capsys.readouterr().out
    assert "/generate (wav)" in report
    assert "4 of 4" in report


def test_json_and_picture(start_server: Any, tmp_path: Path) -> None:
    server = start_server(None, "--api-key", "secret")
    paths = {"--json": tmp_path / "sub" / "r.json", "--plot": tmp_path / "sub" / "r.png"}
    files = [word for flag, path in paths.items() for word in (flag, str(path))]
    flags = ["--url", server.url, "-n", "3", "--warmup", "0", "--response-format", "mp3"]
    assert bench(*flags, "--api-key", "secret", *files) == 0
    text = paths["--json"].read_text(encoding="utf-8")
    written = json.loads(text)
    assert written["result"]["num_requests"] == 3
    assert written["result"]["audio_s"] > 0
    assert written["circumstances"]["command"].startswith("vllm bench serve --url http://")
    assert "secret" not in text
    assert paths["--plot"].read_bytes().startswith(b"\x89PNG")


def test_failures_are_told_and_are_the_status(
    live: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--url", live.url, "-n", "2", "--warmup", "0", "--voice", "nobody") == 1
    report = capsys.readouterr().out
    assert "2 x status 400" in report
    assert "'nobody' is unknown" in report
    assert "real-time capable: no" in report


def test_a_server_that_is_not_ready(
    start_server: Any, fake_engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = fake_engine()
    engine.may_start.clear()
    server = start_server(engine, wait_ready=False)
    assert bench("--url", server.url) == 1
    assert "does not serve" in capsys.readouterr().err
    engine.may_start.set()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost:8000", "http://[x"])
def test_an_absent_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--url", url) == 1
    assert "does not serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--num-requests", "0"),
        ("--concurrency", "x"),
        ("--request-rate", "0"),
        ("--request-rate", "fast"),
        ("--extra-body", "[1]"),
        ("--endpoint", "chat"),
        ("--response-format", "ogg"),
    ],
)
def test_wrong_values_name_their_flag(
    flags: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench(*flags)
    assert flags[0] in capsys.readouterr().err


def test_an_empty_text_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").write_text("\n", encoding="utf-8")
    assert bench("--text-file", str(tmp_path / "texts")) == 1
    assert "--text-file" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vllm.entrypoints.cli.bench.find_spec", lambda name: None)
    assert importlib.util.find_spec("httpx") is not None
    assert bench() == 1
    assert "pip install 'higgs-audio-vllm[bench]'" in capsys.readouterr().err
