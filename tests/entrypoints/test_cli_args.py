"""Flags: made from configuration fields, dashes or underscores, upstream's accepted or refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from vllm.config import EngineConfig
from vllm.entrypoints.cli_args import IGNORED_FLAGS, REFUSED_FLAGS, parse_serve_args
from vllm.entrypoints.server_config import ServerConfig


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as ending:
        parse_serve_args(flags)
    assert ending.value.code == 2
    return capsys.readouterr().err


def test_no_flags_give_the_defaults() -> None:
    args = parse_serve_args([])
    assert args.engine == EngineConfig()
    assert args.server == ServerConfig()
    assert args.server.port == 8000
    assert args.model_names == ("higgs-audio-tiny",)


def test_every_field_has_a_flag() -> None:
    parts = [ServerConfig, *get_type_hints(EngineConfig).values()]
    values = {bool: [], int: ["64"], float: ["0.5"], str: ["/x"]}
    checked = 0
    for part in parts:
        hints = get_type_hints(part)
        for item in dataclasses.fields(part):
            value = values.get(hints[item.name])
            if value is None or item.name in {"block_size", "ssl_cert_reqs", "response_cache"}:
                continue
            parse_serve_args(["--api-key", "k", f"--{item.name.replace('_', '-')}", *value])
            checked += 1
    assert checked > 25


def test_the_documented_command_line() -> None:
    args = parse_serve_args(
        [
            "--model",
            "bosonai/higgs-audio-v2-generation-3B-base",
            "--audio-tokenizer-type",
            "bosonai/higgs-audio-v2-tokenizer",
            "--port",
            "8778",
            "--host",
            "0.0.0.0",
            "--max-model-len",
            "8192",
            "--gpu-memory-utilization",
            "0.90",
            "--ras-window-length",
            "7",
            "--ras-max-num-repeat",
            "2",
        ]
    )
    assert args.engine.model.model == "bosonai/higgs-audio-v2-generation-3B-base"
    assert args.engine.audio.audio_tokenizer_type == "bosonai/higgs-audio-v2-tokenizer"
    assert (args.server.host, args.server.port) == ("0.0.0.0", 8778)
    assert args.model_names == ("bosonai/higgs-audio-v2-generation-3B-base",)


@pytest.mark.parametrize(
    "flags", [["--max_model_len", "128"], ["--max-model-len=128"], ["--max_model_len=128"]]
)
def test_dashes_and_underscores_are_alike(flags: list[str]) -> None:
    assert parse_serve_args(flags).engine.model.max_model_len == 128


def test_underscores_in_values_stay() -> None:
    assert parse_serve_args(["--default_voice=en_man"]).server.default_voice == "en_man"


def test_the_last_flag_wins() -> None:
    assert parse_serve_args(["--port", "1", "--port", "2"]).server.port == 2


def test_switches_can_be_turned_off() -> None:
    args = parse_serve_args(["--no-batch-invariant", "--no-enable-prefix-caching"])
    assert not args.engine.device.batch_invariant
    assert not args.engine.cache.enable_prefix_caching


def test_lists() -> None:
    args = parse_serve_args(
        [
            *("--served-model-name", "a", "b", "--api-key", "k", "l", "--stream-ramp", "2", "4"),
            *("--allowed-origins", '["http://x"]', "--middleware", "m.A", "--middleware", "m.B"),
        ]
    )
    assert args.model_names == ("a", "b")
    assert args.server.keys == ("k", "l")
    assert args.engine.audio.stream_ramp == (2, 4)
    assert args.server.allowed_origins == ("http://x",)
    assert args.server.middleware == ("m.A", "m.B")


@pytest.mark.parametrize(
    ("given", "prefilled", "named"),
    [
        ((), (), None),
        (("none",), (), ()),
        (("all",), ("all",), None),
        (("anna", "en_man"), ("anna", "en_man"), ("anna", "en_man")),
    ],
)
def test_which_voices_are_prefilled_and_pinned(
    given: tuple[str, ...], prefilled: tuple[str, ...], named: tuple[str, ...] | None
) -> None:
    config = ServerConfig(pinned_voices=given)
    assert (config.prefilled_voices, config.named_voices) == (prefilled, named)


def test_model_as_an_argument() -> None:
    assert parse_serve_args(["some/model"]).engine.model.model == "some/model"


def test_a_codec_folder_goes_before_its_type(tmp_path: Path) -> None:
    folder = str(tmp_path)
    args = parse_serve_args(["--audio-tokenizer-path", folder, "--audio-tokenizer-type", "hub/c"])
    assert args.engine.audio.audio_tokenizer_type == folder


@pytest.mark.parametrize("flag", IGNORED_FLAGS)
def test_flags_without_effect_are_accepted(flag: str) -> None:
    args = parse_serve_args([flag, *["1"] * IGNORED_FLAGS[flag]])
    assert args.ignored_flags == (flag,)
    assert args.engine == EngineConfig()


@pytest.mark.parametrize("flag", REFUSED_FLAGS)
def test_flags_that_are_not_supported_are_refused_with_advice(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{flag} is not supported: {REFUSED_FLAGS[flag]}" in refusal(capsys, flag, "1")


def test_switches_that_are_not_supported_are_refused_in_their_negated_form(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flag = "--no-async-scheduling"
    assert f"{flag} is not supported: steps are scheduled" in refusal(capsys, flag)


def test_quantization_has_upstreams_short_form() -> None:
    assert parse_serve_args(["-q", "int8"]).engine.model.quantization == "int8"


def test_chunked_prefill_may_be_asked_for_and_not_switched_off(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert parse_serve_args(["--enable_chunked_prefill"]).ignored_flags
    assert "it is always on" in refusal(capsys, "--no-enable-chunked-prefill")


def test_flags_named_in_advice_exist() -> None:
    known = {
        f"--{item.name.replace('_', '-')}"
        for part in (ServerConfig, *get_type_hints(EngineConfig).values())
        for item in dataclasses.fields(part)
    }
    words = {word.strip(";,()") for advice in REFUSED_FLAGS.values() for word in advice.split()}
    named = {word.replace("--no-", "--") for word in words if word.startswith("--")}
    assert named
    assert named <= known


def test_one_device_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_serve_args(["-tp", "1"]).ignored_flags == ("-tp",)
    assert "--tensor-parallel-size 2 is not supported" in refusal(
        capsys, "--tensor-parallel-size", "2"
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--nonsense"], "--nonsense"),
        (["--port", "70000"], "--port"),
        (["--port", "x"], "--port"),
        (["--max-model-len", "3"], "--max-model-len"),
        (["--ras-window-length", "65"], "--ras-window-length"),
        (["--allowed-origins", "*"], "--allowed-origins"),
        (["--dtype", "int8"], "--dtype"),
        (["--encoder-threads", "0"], "--encoder-threads"),
        (["--ssl-keyfile", "key.pem"], "--ssl-certfile"),
        (["--ssl-keyfile", "no.pem", "--ssl-certfile", "no.pem"], "--ssl-keyfile no.pem"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout"),
        (["--shutdown-timeout", "inf"], "--shutdown-timeout inf"),
        (["--request-timeout", "nan"], "--request-timeout nan"),
        (["--max-body-mib", "0"], "--max-body-mib 0.0: above 0"),
        (["--voice-presets-refresh-interval", "0"], "--voice-presets-refresh-interval"),
        (["--voice-presets-dir", "no/where"], "--voice-presets-dir no/where: there is no such"),
        (["--audio-tokenizer-path", "no/where"], "--audio-tokenizer-path no/where"),
        (["--allowed-local-media-path", "no/where"], "--allowed-local-media-path no/where"),
        (["--voice-store", __file__], "is a file; give a folder"),
        (["--voice-store", "gs://bucket"], "--voice-store gs://bucket"),
        (["--voice-store", "s3://"], "s3://BUCKET/PREFIX"),
        (["--voice-store", "s3://UPPER/x"], "s3://BUCKET/PREFIX"),
        (["--voice-store", "s3://bucket?x=1"], "s3://BUCKET/PREFIX"),
        (["--served-model-name", ""], "--served-model-name"),
        (["--root-path", "tts"], "--root-path tts: it begins with /"),
        (["--root-path", "/tts/"], "--root-path /tts/"),
        (["--allowed-origins", '["example.org"]'], "--allowed-origins 'example.org'"),
        (["--allowed-origins", '["https://a/"]'], "--allowed-origins 'https://a/'"),
        (["--allowed-methods", '["post"]'], "--allowed-methods 'post'"),
        (["--allowed-headers", '["a b"]'], "--allowed-headers 'a b'"),
        (["--ssl-cert-reqs", "3"], "--ssl-cert-reqs 3: 0 (none)"),
        (["--ssl-cert-reqs", "2"], "--ssl-ca-certs"),
        (["--ssl-keyfile", __file__, "--ssl-certfile", __file__], f"--ssl-certfile {__file__}"),
        (["--max-audio-seconds", "inf"], "--max-audio-seconds inf"),
        (["--prefill-max-wait-ms", "-1"], "--prefill-max-wait-ms -1.0"),
        (["--prefill-min-tokens", "-1"], "--prefill-min-tokens -1"),
        (["--cpu-threads", "100000"], "--cpu-threads 100000: 0 to 1024"),
        (["--pinned-voices", "all", "anna"], "--pinned-voices all anna: all and none stand alone"),
        (["--pinned-voices", "a", "--no-enable-prefix-caching"], "--pinned-voices needs"),
    ],
)
def test_wrong_values_name_their_flag(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refusal(capsys, *flags)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VLLM_LOGGING_LEVEL", "loud"),
        ("VLLM_AUDIO_FETCH_TIMEOUT", "soon"),
        ("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "0"),
        ("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "perhaps"),
    ],
)
def test_wrong_variables_are_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert f"{name}={value!r}" in refusal(capsys)


def test_keys_fall_back_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "env")
    assert parse_serve_args([]).server.keys == ("env",)
    assert parse_serve_args(["--api-key", "flag"]).server.keys == ("flag",)


def test_help_lists_every_group(capsys: pytest.CaptureFixture[Any]) -> None:
    with pytest.raises(SystemExit):
        parse_serve_args(["--help"])
    page = capsys.readouterr().out
    for word in ("HTTP server", "engine: cache", "accepted without effect", "--ras-mode"):
        assert word in page
    assert "--calculate-kv-scales" not in page


@pytest.mark.parametrize(("text", "expected"), [("8k", 8000), ("8K", 8192), ("4096", 4096)])
def test_context_length_may_be_written_in_thousands(text: str, expected: int) -> None:
    assert parse_serve_args(["--max-model-len", text]).engine.model.max_model_len == expected


def test_dtype_knows_upstreams_short_names() -> None:
    assert parse_serve_args(["--dtype", "half"]).engine.model.dtype == "float16"


@pytest.mark.parametrize("flag", ["-tp", "-pp", "--data-parallel-size"])
def test_parallel_sizes_of_one_have_no_effect(flag: str) -> None:
    assert parse_serve_args([flag, "1"]).ignored_flags == (flag,)
    with pytest.raises(SystemExit):
        parse_serve_args([flag, "2"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("2000000", 2_000_000),
        ("64M", 64 * 2**20),
        ("64MiB", 64 * 2**20),
        ("1.5g", 3 * 2**29),
    ],
)
def test_sizes_may_have_units(text: str, expected: int) -> None:
    assert parse_serve_args(["--response-cache", text]).server.response_cache == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("much", "is no number of bytes"),
        ("-1", "is no number of bytes"),
        ("100", "0, or at least 1M"),
    ],
)
def test_a_wrong_size_is_refused(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_serve_args(["--response-cache", text])
    assert words in capsys.readouterr().err
