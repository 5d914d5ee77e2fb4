"""``vllm run-batch in.jsonl out.jsonl``: speak many texts without a server, and go on after a stop.

Lines have the form of OpenAI's batch files. A result is appended as soon as it exists; what the
output file holds already is not spoken again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from vllm.entrypoints.cli_args import (
    ServeArgs,
    add_engine_flags,
    normalize_flags,
    parse_engine_config,
)
from vllm.entrypoints.server_config import ServerConfig
from vllm.exceptions import ConfigError, EngineDeadError, InvalidRequestError
from vllm.logger import configure_logging

if TYPE_CHECKING:
    from vllm.entrypoints.bosonai.batch_speech import BatchItem, Failure, Spoken
    from vllm.entrypoints.bosonai.engine_host import EngineClient
    from vllm.entrypoints.bosonai.serving_audio import ServingAudio
    from vllm.entrypoints.openai.protocol import AudioSpeechRequest

__all__ = ["run"]

_URL = "/v1/audio/speech"
_RESULT_PREFIX = "batch-"
_LINE_START = f'{{"id":"{_RESULT_PREFIX}'.encode()


@dataclass(frozen=True)
class _Request:
    """One line of the input."""

    custom_id: str
    fields: Mapping[str, Any]


def run(argv: Sequence[str]) -> int:
    """Speak every line that has no result yet; 0 also when some of them failed."""
    parser = _parser()
    arguments = parser.parse_args(normalize_flags(argv))
    try:
        source = _one_of("INPUT", arguments.input, arguments.input_file)
        target = _one_of("OUTPUT", arguments.output, arguments.output_file)
        args = _serve_args(arguments)
        requests = _read_requests(source)
        finished = _finished_ids(target, source)
    except ConfigError as error:
        parser.error(str(error))
    left = [request for request in requests if request.custom_id not in finished]
    num_failed = 0
    if left:
        configure_logging("warning")
        try:
            num_failed = asyncio.run(_speak(args, left, target, _make_engine(args)))
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 130
    print(
        f"{target}: {len(left) - num_failed} spoken, {num_failed} failed, "
        f"{len(requests) - len(left)} were there already"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm run-batch",
        usage="%(prog)s INPUT OUTPUT [flags]  (or -i INPUT -o OUTPUT)",
        allow_abbrev=False,
    )
    add_engine_flags(parser)
    parser.add_argument(
        "input",
        nargs="?",
        type=Path,
        metavar="INPUT",
        help='lines {"custom_id": ..., "method": "POST", "url": "/v1/audio/speech", "body": {...}}',
    )
    parser.add_argument(
        "output", nargs="?", type=Path, metavar="OUTPUT", help="file that results go to"
    )
    parser.add_argument("-i", "--input-file", type=Path, metavar="INPUT", help="the same")
    parser.add_argument("-o", "--output-file", type=Path, metavar="OUTPUT", help="the same")
    parser.add_argument(
        "--voice-presets-dir", metavar="DIR", help="folder with config.json and clips"
    )
    parser.add_argument("--default-voice", help="voice of lines that name none")
    parser.add_argument(
        "--served-model-name", nargs="+", default=(), help="names that lines may give as model"
    )
    return parser


def _one_of(name: str, *places: Path | None) -> Path:
    """The one that was given; raises ConfigError for none or two."""
    given = [place for place in places if place is not None]
    if len(given) != 1:
        found = "is missing" if not given else "is given twice"
        raise ConfigError(f"{name} {found}; give INPUT OUTPUT, or -i INPUT -o OUTPUT")
    return given[0]


def _serve_args(arguments: argparse.Namespace) -> ServeArgs:
    server = ServerConfig(
        voice_presets_dir=arguments.voice_presets_dir,
        default_voice=arguments.default_voice,
        served_model_name=tuple(arguments.served_model_name),
    )
    return ServeArgs(parse_engine_config(vars(arguments)), server)


def _make_engine(args: ServeArgs) -> Callable[[], EngineClient]:
    from vllm.entrypoints.bosonai.api_server import create_engine

    return partial(create_engine, args)


def _read_requests(path: Path) -> list[_Request]:
    """Lines of the input, checked for what a result needs: an id of its own.

    Raises:
        ConfigError: the file cannot be read, or a line has no such id.
    """
    requests: dict[str, _Request] = {}
    for number, fields in _json_lines(path, "input"):
        custom_id = fields.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            raise ConfigError(f"{path}, line {number}: custom_id is missing; give a string")
        if custom_id in requests:
            raise ConfigError(f"{path}, line {number}: custom_id {custom_id!r} is used twice")
        requests[custom_id] = _Request(custom_id, fields)
    return list(requests.values())


def _finished_ids(path: Path, source: Path) -> set[str]:
    """Ids that the output holds; half a line at its end, left by a crash, is cut off.

    Raises:
        ConfigError: the file is the input, cannot be written to, or holds something else.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise ConfigError(f"output {path}: there is no folder {path.parent}")
        return set()
    if path.samefile(source):
        raise ConfigError(f"output {path} is the input; choose another file")
    _cut_torn_line(path)
    return {str(fields.get("custom_id")) for _, fields in _json_lines(path, "output")}


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        rest = data[end:]
        if not rest.startswith(_LINE_START[: len(rest)]):
            raise ConfigError(f"output {path} holds something else than results; choose another")
        file.truncate(end)


def _json_lines(path: Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects; empty lines are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not valid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}, line {number}: not a JSON object")
        yield number, fields


class _ResultFile:
    """Appends whole lines, each in one write."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, custom_id: str, result: Spoken | Failure) -> None:
        line = json.dumps(_result_line(custom_id, result), separators=(",", ":")).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(f"a result could not be written whole to {self._file.name}")


def _result_line(custom_id: str, result: Spoken | Failure) -> dict[str, Any]:
    from vllm.entrypoints.bosonai.batch_speech import Failure

    if isinstance(result, Failure):
        status, body = result.status, result.body
    else:
        status, body = 200, result.as_json()
    name = f"{_RESULT_PREFIX}{secrets.token_hex(8)}"
    return {
        "id": name,
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": name, "body": body},
        "error": None,
    }


async def _speak(
    args: ServeArgs,
    requests: Sequence[_Request],
    output: Path,
    make_engine: Callable[[], EngineClient],
) -> int:
    """Speak all requests, many at a time; returns how many failed.

    Raises:
        EngineDeadError: the engine died; requests without a result can be taken up again.
    """
    from tqdm import tqdm

    from vllm.entrypoints.bosonai.engine_host import EngineHost
    from vllm.entrypoints.bosonai.reference_audio import ReferenceAudioLoader
    from vllm.entrypoints.bosonai.serving_audio import ServingAudio
    from vllm.entrypoints.bosonai.synthesis import Synthesizer
    from vllm.v1.metrics import SpeechMetrics

    host = EngineHost(make_engine)
    metrics = SpeechMetrics(args.model_names[0], lambda: None)
    synthesizer = Synthesizer(args.server, host, metrics)
    with ThreadPoolExecutor(args.server.encoder_threads) as pool, _ResultFile(output) as results:
        serving = ServingAudio(args, synthesizer, pool, ReferenceAudioLoader(args.server, pool))
        try:
            await host.engine.start()
            with tqdm(total=len(requests), desc="Speaking", unit="request") as progress:
                work = _Work(serving, requests, results, progress.update)
                await _together(work.run() for _ in range(synthesizer.admission.limit))
        finally:
            await host.close()
    return work.num_failed


async def _together(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first failure ends the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Work:
    """Takes requests one by one, for as many takers as may speak together."""

    def __init__(
        self,
        serving: ServingAudio,
        requests: Iterable[_Request],
        results: _ResultFile,
        on_result: Callable[[], object],
    ) -> None:
        self._serving = serving
        self._pending = iter(requests)
        self._results = results
        self._on_result = on_result
        self.num_failed = 0

    async def run(self) -> None:
        from vllm.entrypoints.bosonai.batch_speech import Failure, speak

        for request in self._pending:
            result = await speak(self._serving, _item(request))
            if isinstance(result, Failure):
                if result.body["error"]["code"] == EngineDeadError.code:
                    raise EngineDeadError(f"{result.message}; the same command goes on from here")
                self.num_failed += 1
            self._results.append(request.custom_id, result)
            self._on_result()


def _item(request: _Request) -> BatchItem:
    from vllm.entrypoints.bosonai.admission import Ticket
    from vllm.entrypoints.bosonai.batch_speech import BatchItem

    def ticket(body: AudioSpeechRequest) -> Ticket:
        return Ticket(
            client_id=request.custom_id,
            priority=body.priority or 0,
            timeout_s=body.timeout_s,
        )

    return BatchItem(partial(_read_body, request.fields), ticket)


def _read_body(fields: Mapping[str, Any]) -> AudioSpeechRequest:
    from vllm.entrypoints.bosonai.batch_speech import read_item

    for name, allowed in (("method", "POST"), ("url", _URL)):
        if fields.get(name) != allowed:
            raise InvalidRequestError(
                f"{name}={fields.get(name)!r} is not allowed; give {allowed!r}", param=name
            )
    body = fields.get("body")
    if not isinstance(body, dict):
        raise InvalidRequestError("body is missing; give a speech request", param="body")
    return read_item(body)
