"""``vllm run-batch``: lines in, results out, and going on where a run was stopped."""

from __future__ import annotations

import base64
import json
import wave
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from vllm.entrypoints.bosonai import api_server
from vllm.entrypoints.cli import main
from vllm.exceptions import EngineDeadError


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, fake_engine: Any) -> list[Any]:
    """Engines that were made, each by one run."""
    made: list[Any] = []

    def create(_: Any) -> Any:
        made.append(fake_engine())
        return made[-1]

    monkeypatch.setattr(api_server, "create_engine", create)
    return made


def line(custom_id: str, **changes: Any) -> dict[str, Any]:
    body = {"input": "hello", "response_format": "wav", "seed": 1, **changes.pop("body", {})}
    url = "/v1/audio/speech"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **changes}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    return path


def results(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()]
    assert len({each["custom_id"] for each in lines}) == len(lines)
    return {each["custom_id"]: each["response"] for each in lines}


def test_every_line_gets_its_result(
    tmp_path: Path, engines: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(
        tmp_path / "in.jsonl",
        line("good"),
        line("no voice", body={"voice": "nobody"}),
        line("wrong url", url="/v1/embeddings"),
        line("no body", body={}) | {"body": None},
        line("wrong field", body={"speed": 9}),
    )
    output = tmp_path / "out.jsonl"
    assert main(["run-batch", str(source), str(output)]) == 0
    found = results(output)
    assert {name: each["status_code"] for name, each in found.items()} == {
        "good": 200,
        "no voice": 400,
        "wrong url": 400,
        "no body": 400,
        "wrong field": 400,
    }
    assert found["wrong url"]["body"]["error"]["param"] == "url"
    good = found["good"]["body"]
    with wave.open(BytesIO(base64.b64decode(good["audio_data"]))) as file:
        assert file.getnframes() == 5 * 2 * 960
    assert good["usage"]["audio_tokens"] == 10
    assert "1 spoken, 4 failed, 0 were there already" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("-i", "-o"), ("--input-file", "--output_file")])
def test_upstreams_names_of_the_files(
    tmp_path: Path, engines: list[Any], names: tuple[str, str]
) -> None:
    source, output = write(tmp_path / "a", line("1")), tmp_path / "out.jsonl"
    assert main(["run-batch", names[0], str(source), names[1], str(output)]) == 0
    assert set(results(output)) == {"1"}


@pytest.mark.parametrize("files", [["a"], [], ["-i", "a"], ["a", "b", "-i", "c"]])
def test_both_files_are_needed_once(
    files: list[str], engines: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["run-batch", *files])
    assert "give INPUT OUTPUT, or -i INPUT -o OUTPUT" in capsys.readouterr().err
    assert not engines


def test_a_second_run_goes_on(
    tmp_path: Path, engines: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    main(["run-batch", str(write(tmp_path / "a", line("1"), line("2"))), str(output)])
    before = output.read_bytes()
    with output.open("ab") as file:
        file.write(b'{"id":"batch-12ab","custom_id":"3","resp')  # a crash in the middle of a line
    source = write(tmp_path / "b", *(line(name) for name in "1234"))
    assert main(["run-batch", str(source), str(output)]) == 0
    assert output.read_bytes().startswith(before)
    assert set(results(output)) == set("1234")
    assert len(engines[1].seen) == 2
    assert "2 spoken, 0 failed, 2 were there already" in capsys.readouterr().out
    assert main(["run-batch", str(source), str(output)]) == 0
    assert len(engines) == 2  # nothing left, so no engine was started


def test_a_dead_engine_leaves_its_lines_for_the_next_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_engine: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = fake_engine(fail_before=EngineDeadError("the engine process is gone"))
    monkeypatch.setattr(api_server, "create_engine", lambda _: broken)
    output = tmp_path / "out.jsonl"
    assert main(["run-batch", str(write(tmp_path / "in", line("1"), line("2"))), str(output)]) == 1
    assert output.read_bytes() == b""
    assert "goes on from here" in capsys.readouterr().err


def test_many_lines_are_spoken_together(tmp_path: Path, engines: list[Any]) -> None:
    source = write(tmp_path / "in", *(line(str(index)) for index in range(100)))
    assert main(["run-batch", str(source), str(tmp_path / "out")]) == 0
    assert len(results(tmp_path / "out")) == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"custom_id": "1"}\n{', "line 2: not valid JSON"),
        ('{"body": {}}', "line 1: custom_id is missing"),
        ('{"custom_id": "1"}\n\n{"custom_id": "1"}', "line 3: custom_id '1' is used twice"),
        ("[]", "line 1: not a JSON object"),
    ],
)
def test_a_wrong_input_is_refused_before_the_model_is_loaded(
    tmp_path: Path,
    engines: list[Any],
    text: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as ending:
        main(["run-batch", str(source), str(tmp_path / "out.jsonl")])
    assert ending.value.code == 2
    assert message in capsys.readouterr().err
    assert engines == []


def test_files_that_cannot_be_used(
    tmp_path: Path, engines: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", line("1"))
    foreign = tmp_path / "foreign"
    foreign.write_text("a file without a line end")
    for paths in (
        (source, foreign),
        (tmp_path / "none", tmp_path / "out"),
        (source, source),
        (source, tmp_path / "none" / "out"),
    ):
        with pytest.raises(SystemExit):
            main(["run-batch", *map(str, paths)])
    told = capsys.readouterr().err
    assert "cannot be read" in told
    assert "is the input" in told
    assert "holds something else" in told
    assert foreign.read_text() == "a file without a line end"
    assert "there is no folder" in told
    assert json.loads(source.read_text(encoding="utf-8"))["custom_id"] == "1"
