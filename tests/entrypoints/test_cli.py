"""The ``vllm`` command: subcommands, files by their extension, errors without a traceback."""

from __future__ import annotations

import sys
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

import vllm
from vllm.entrypoints.cli import main
from vllm.exceptions import CheckpointError
from vllm.outputs import FinishReason, SpeechOutput, SpeechStats
from vllm.prompts import Voice

RATE = 24_000


class FakeLLM:
    made: FakeLLM

    def __init__(self, **options: Any) -> None:
        FakeLLM.made = self
        self.options = options
        self.is_open = True
        self.voices = self

    def resolve(self, name: str | None) -> Voice:
        asked_for = name if name == "de_man" else ""
        return Voice("en_woman", "English Woman", asked_for=asked_for)

    def generate(self, prompts: list[Any], params: Any) -> list[SpeechOutput]:
        self.prompt, self.params = prompts[0], params
        return [
            SpeechOutput(
                request_id="0",
                audio=np.full(RATE, 0.25, np.float32),
                codes=np.zeros((8, 25), np.int16),
                delayed_codes=np.zeros((33, 8), np.int16),
                sample_rate=RATE,
                finish_reason=FinishReason.STOP,
                stats=SpeechStats(audio_duration_s=1.0),
                seed=5,
            )
        ]

    def shutdown(self) -> None:
        self.is_open = False


@pytest.fixture(autouse=True)
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.llm", SimpleNamespace(LLM=FakeLLM))


def test_an_unknown_voice_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeLLM, "generate", lambda *_: pytest.fail("a model was loaded"))
    assert (
        main(["say", "Hi.", "-o", str(tmp_path / "a.wav"), "--model", "m", "--voice", "nobody"])
        == 1
    )
    error = capsys.readouterr().err
    assert "--voice nobody" in error
    assert "en_woman" in error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["--version"])
    assert ending.value.code == 0
    assert capsys.readouterr().out.strip() == vllm.__version__


@pytest.mark.parametrize("words", [[], ["sing"]])
def test_an_unknown_command_lists_those_there_are(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        main(words)
    assert ending.value.code == 2
    assert "command" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "say", "run-batch", "voices", "checkpoint"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main([command, "--help"])
    assert ending.value.code == 0
    assert f"vllm {command}" in capsys.readouterr().out


def test_say_writes_a_wav(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.wav"
    words = ["say", "Hello.", "-o", str(out), "--voice", "en_man", "--seed", "5"]
    assert main([*words, "--device", "cpu", "--max_model_len", "256"]) == 0
    with wave.open(str(out)) as file:
        assert (file.getnframes(), file.getframerate()) == (RATE, RATE)
    llm = FakeLLM.made
    assert (llm.prompt.text, llm.prompt.voice, llm.params.seed) == ("Hello.", "en_man", 5)
    assert (llm.options["device"], llm.options["max_model_len"]) == ("cpu", 256)
    assert not llm.is_open
    assert "seed 5, ended by stop" in capsys.readouterr().out


def test_a_command_that_is_interrupted_shows_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeLLM, "generate", interrupted)
    assert main(["say", "Hello.", "-o", str(tmp_path / "a.wav")]) == 130
    assert capsys.readouterr().err == "vllm say: stopped\n"
    assert not FakeLLM.made.is_open


def test_say_tells_who_speaks_for_a_voice_that_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for voice in ("en_woman", "de_man"):
        assert main(["say", "Hello.", "-o", str(tmp_path / "a.wav"), "--voice", voice]) == 0
    assert capsys.readouterr().err == (
        "vllm say: the model does not speak de_man; en_woman speaks instead\n"
    )


@pytest.mark.parametrize("name", ["mp3", "opus", "aac", "flac"])
def test_say_takes_the_format_from_the_extension(tmp_path: Path, name: str) -> None:
    out = tmp_path / f"out.{name}"
    assert main(["say", "Hello.", "-o", str(out)]) == 0
    with av.open(str(out)) as container:
        assert container.streams.audio[0].codec_context.name.startswith(name[:3])


def test_say_changes_the_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.pcm"
    assert main(["say", "Hello.", "-o", str(out), "--speed", "2"]) == 0
    assert out.stat().st_size == RATE
    assert "0.50 s of audio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["-o", "out.txt"], "--output 'txt'"),
        (["-o", "none/out.wav"], "there is no folder none"),
        (["-o", "out.wav", "--seed", "-1"], "seed"),
        (["-o", "out.wav", "--speed", "9"], "--speed 9"),
        (["-o", "out.wav", "--temperature", "-1"], "temperature"),
    ],
)
def test_say_names_what_is_wrong(
    flags: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["say", "Hello.", *flags]) == 1
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_upstream_flag_is_refused_here_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["say", "Hello.", "-o", "x.wav", "--cpu-offload-gb", "4"])
    assert "--cpu-offload-gb is not supported" in capsys.readouterr().err


def voices_listed(lines: list[str]) -> dict[str, str]:
    """Id -> the rest of its line."""
    return dict(line[2:].split(maxsplit=1) for line in lines[:-1])


def test_voices_lists_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["voices", "--model", "some/model"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = voices_listed(lines)
    assert {"en_man", "en_woman", "de_man", "de_woman", "zh_man", "zh_woman"} <= listed.keys()
    assert all(" s clip " in rest for rest in listed.values())
    assert [line for line in lines if line.startswith("* en_woman")]
    assert "alloy = en_woman" in lines[-1]


@pytest.mark.parametrize("flags", [[], ["--model", "higgs-audio-tiny"]])
def test_voices_of_the_embedded_model_say_which_it_speaks(
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["voices", *flags]) == 0
    listed = voices_listed(capsys.readouterr().out.splitlines())
    assert "not spoken" not in listed.pop("en_woman")
    assert listed
    assert all("not spoken" in rest for rest in listed.values())


def test_voices_names_a_wrong_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["voices", "--voice_presets_dir", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


def test_checkpoint_make_passes_its_flags_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        "vllm.entrypoints.cli.checkpoint.run_make",
        lambda out, **options: calls.append((out, options)) or "made",
    )
    words = ["--layout", "transformers", "--size", "medium", "--seed", "3", "--out", str(tmp_path)]
    assert main(["checkpoint", "make", *words]) == 0
    assert calls == [(tmp_path, {"layout": "transformers", "size": "medium", "seed": 3})]
    assert capsys.readouterr().out == "made\n"


@pytest.mark.parametrize(("is_sound", "status"), [(True, 0), (False, 1)])
def test_checkpoint_inspect_tells_by_its_status(
    monkeypatch: pytest.MonkeyPatch, is_sound: bool, status: int
) -> None:
    monkeypatch.setattr(
        "vllm.entrypoints.cli.checkpoint.run_inspect", lambda folder: ("report", is_sound)
    )
    assert main(["checkpoint", "inspect", "somewhere"]) == status


def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> None:
        raise CheckpointError("no config.json")

    monkeypatch.setattr("vllm.entrypoints.cli.checkpoint.run_inspect", fail)
    assert main(["checkpoint", "inspect", "somewhere"]) == 1
    assert capsys.readouterr().err == "vllm checkpoint: no config.json\n"
