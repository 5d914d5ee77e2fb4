"""``vllm bench serve``: load on a speech server, this one or a peer, and what it makes of it."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.audio import FORMATS
from vllm.entrypoints.cli_args import normalize_flags
from vllm.exceptions import ConfigError

if TYPE_CHECKING:
    from vllm.benchmarks import Load
    from vllm.benchmarks.client import Settings

__all__ = ["run"]

_DEFAULT_CONCURRENCY = 16


def run(argv: Sequence[str]) -> int:
    """Measure and print the report; the status is 1 when a request failed."""
    parser = _parser()
    arguments = parser.parse_args(normalize_flags(argv))
    _require("httpx")
    if arguments.plot is not None:
        _require("matplotlib")
    settings, load = _settings(arguments), _load(arguments)
    import httpx

    from vllm.benchmarks import format_report, plot_point, write_results

    try:
        point = asyncio.run(_measure(arguments, settings, load))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        print(f"{settings.base_url} does not serve: {error!r}", file=sys.stderr)
        return 1
    print(format_report(point, _configuration(arguments, settings, load)))
    if arguments.json is not None:
        shown = asdict(settings) | {"api_key": None}
        command = _shown_command(argv, arguments.api_key)
        write_results(arguments.json, {"settings": shown, "result": point}, command=command)
    if arguments.plot is not None:
        plot_point(point, arguments.plot)
    return int(point["num_failures"] > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm bench", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)
    serve = actions.add_parser(
        "serve", help="send speech requests to a running server", allow_abbrev=False
    )
    serve.add_argument(
        "--url", "--base-url", "--server", default="http://127.0.0.1:8000", dest="url"
    )
    serve.add_argument(
        "--endpoint",
        choices=("speech", "generate"),
        default="speech",
        help="OpenAI's /v1/audio/speech or the proxy's /generate",
    )
    serve.add_argument(
        "--num-requests", "--requests", "-n", type=_count(1), default=32, dest="num_requests"
    )
    serve.add_argument(
        "--concurrency",
        "--concurrent",
        "-c",
        type=_count(1),
        dest="concurrency",
        help=f"requests under way at once; default {_DEFAULT_CONCURRENCY}, or no limit with a rate",
    )
    serve.add_argument(
        "--request-rate",
        type=_rate,
        default=math.inf,
        metavar="R",
        help="requests per second at random times (Poisson); inf, the default, never waits",
    )
    serve.add_argument(
        "--warmup", type=_count(0), default=4, help="requests before, which do not count"
    )
    serve.add_argument(
        "--text-file", type=Path, metavar="FILE", help="one text per line, taken in turn"
    )
    serve.add_argument("--voice")
    serve.add_argument("--model", help="name to send; default: none")
    serve.add_argument("--response-format", choices=tuple(FORMATS), default="pcm")
    serve.add_argument("--temperature", type=float)
    serve.add_argument("--max-tokens", type=_count(1), help="frames of a request")
    serve.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON")
    serve.add_argument("--api-key", help="default: VLLM_API_KEY")
    serve.add_argument("--timeout-s", type=float, default=120.0, help="of one request")
    serve.add_argument(
        "--seed", type=_count(0), help="of the requests and their times; default: none is sent"
    )
    serve.add_argument("--json", type=Path, metavar="FILE")
    serve.add_argument("--plot", type=Path, metavar="FILE", help="a PNG")
    return parser


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(
            f"{package} is not installed; this command needs it: "
            "pip install 'higgs-audio-vllm[bench]'"
        )


def _settings(arguments: argparse.Namespace) -> Settings:
    from vllm.benchmarks.client import TEXTS, Settings

    extra = dict(arguments.extra_body)
    if arguments.temperature is not None:
        extra["temperature"] = arguments.temperature
    max_tokens = arguments.max_tokens
    return Settings(
        base_url=arguments.url,
        endpoint=arguments.endpoint,
        response_format=arguments.response_format,
        voice=arguments.voice,
        model=arguments.model,
        api_key=arguments.api_key or envs.VLLM_API_KEY,
        texts=TEXTS if arguments.text_file is None else _read_texts(arguments.text_file),
        max_tokens=None if max_tokens is None else (max_tokens, max_tokens),
        extra=extra,
        timeout_s=arguments.timeout_s,
        seed=arguments.seed,
    )


def _load(arguments: argparse.Namespace) -> Load:
    from vllm.benchmarks import Load

    if math.isinf(arguments.request_rate):
        return Load(concurrency=arguments.concurrency or _DEFAULT_CONCURRENCY)
    return Load(concurrency=arguments.concurrency, rate=arguments.request_rate)


async def _measure(arguments: argparse.Namespace, settings: Settings, load: Load) -> dict[str, Any]:
    from vllm.benchmarks import run_load
    from vllm.benchmarks.client import Client, make_bodies

    async with Client(settings) as client:
        await client.check()
        for body in make_bodies(settings, arguments.warmup):
            await client.speak(body)
        bodies = make_bodies(settings, arguments.num_requests)
        return await run_load(load, bodies, client.speak, seed=settings.seed)


def _configuration(
    arguments: argparse.Namespace, settings: Settings, load: Load
) -> dict[str, object]:
    from vllm.benchmarks.client import ENDPOINTS

    return {
        "server": settings.base_url,
        "endpoint": f"{ENDPOINTS[settings.endpoint]} ({settings.audio_format})",
        "voice": settings.voice or "the server's default",
        "requests": arguments.num_requests,
        "warm-up requests": arguments.warmup,
        "concurrency": load.concurrency or "no limit",
        "request rate": "as they finish" if load.rate is None else f"{load.rate:g} per s",
    }


def _shown_command(argv: Sequence[str], api_key: str | None) -> str:
    command = shlex.join(["vllm", "bench", *argv])
    return command.replace(api_key, "***") if api_key else command


def _read_texts(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text-file {path}: {error}") from None
    texts = tuple(line.strip() for line in lines if line.strip())
    if not texts:
        raise ConfigError(f"--text-file {path} holds no text; one per line is expected")
    return texts


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return parse


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor inf")
    return rate


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
