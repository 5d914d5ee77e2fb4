"""Command-line flags, made from the fields of the configurations, and what they are parsed into.

Holds the tables of upstream flags that are accepted without effect or refused with advice. Starts
nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vllm import envs
from vllm.config import EMBEDDED_MODEL_NAME, EngineConfig
from vllm.entrypoints.server_config import ServerConfig, flag_name
from vllm.exceptions import ConfigError

__all__ = [
    "IGNORED_FLAGS",
    "PARALLEL_SIZES",
    "REFUSED_FLAGS",
    "ServeArgs",
    "add_engine_flags",
    "normalize_flags",
    "parse_engine_config",
    "parse_serve_args",
]


@dataclass(frozen=True)
class ServeArgs:
    """What the command line of the server says, in full."""

    engine: EngineConfig
    server: ServerConfig
    ignored_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.server.prefilled_voices and not self.engine.cache.enable_prefix_caching:
            raise ConfigError(
                "--pinned-voices needs --enable-prefix-caching: without it nothing is kept"
            )

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names under which the model is served; the first is reported in answers."""
        return self.server.served_model_name or (self.engine.model.model or EMBEDDED_MODEL_NAME,)


# upstream flag -> number of values it takes
IGNORED_FLAGS: dict[str, int] = {
    "--limit-mm-per-prompt": 1,
    "--disable-mm-preprocessor-cache": 0,
    "--trust-remote-code": 0,
    "--swap-space": 1,
    "--disable-log-requests": 0,
    "--enable-request-id-headers": 0,
    "--enable-chunked-prefill": 0,
}

_NO_CHAT = "chat completions are speech in the form that the model knows; there is nothing to set"
_NO_PARALLEL = "one device serves a model; start one server per device"
_NO_SPECULATION = "frames are generated one by one; nothing replaces it"
_PRESETS = "clone with a preset voice (--voice-presets-dir) or with ref_audio in the request"

# accepted with the value 1
PARALLEL_SIZES = (
    ("--tensor-parallel-size", "-tp"),
    ("--pipeline-parallel-size", "-pp"),
    ("--data-parallel-size", "-dp"),
)

# upstream flag -> what to use instead
REFUSED_FLAGS: dict[str, str] = {
    "--calculate-kv-scales": "the KV cache has no scales; see --kv-cache-dtype",
    "--load-format": "the layout of a checkpoint is detected; convert others to safetensors",
    "--config-format": "the layout of a checkpoint is detected",
    "--model-loader-extra-config": "the layout of a checkpoint is detected",
    "--model-impl": "the model is chosen from its checkpoint",
    "--hf-config-path": "give a folder with config.json as --model",
    "--hf-overrides": "edit config.json in a local copy and give its folder as --model",
    "--hf-token": "set HF_TOKEN in the environment",
    "--tokenizer-mode": "the checkpoint's tokenizer.json is used",
    "--tokenizer-revision": "download that revision and give its folder as --tokenizer",
    "--code-revision": "no code is loaded from checkpoints",
    "--skip-tokenizer-init": "send prompt ids through the Python API: SpeechPrompt",
    "--seed": "send seed in each request; without one a random seed is drawn and reported",
    "--generation-config": "send temperature, top_p and top_k in each request",
    "--override-generation-config": "send temperature, top_p and top_k in each request",
    "--max-seq-len-to-capture": "--max-model-len",
    "--num-gpu-blocks-override": "--kv-cache-memory, in bytes",
    "--kv-cache-memory-bytes": "--kv-cache-memory",
    "--cpu-offload-gb": "lower --max-model-len or --max-num-seqs to save memory",
    "--enable-expert-parallel": _NO_PARALLEL,
    "--distributed-executor-backend": _NO_PARALLEL,
    "--worker-cls": _NO_PARALLEL,
    "--disable-custom-all-reduce": _NO_PARALLEL,
    "--num-scheduler-steps": "steps are scheduled one by one",
    "--scheduling-policy": "requests are served by their priority field, then first come, first served",
    "--no-enable-chunked-prefill": "it is always on; bound it with --max-num-batched-tokens",
    "--max-num-partial-prefills": "--prefill-min-requests and --max-num-batched-tokens",
    "--max-long-partial-prefills": "--max-num-batched-tokens",
    "--long-prefill-token-threshold": "--max-num-batched-tokens",
    "--speculative-config": _NO_SPECULATION,
    "--speculative-model": _NO_SPECULATION,
    "--num-speculative-tokens": _NO_SPECULATION,
    "--compilation-config": "--enforce-eager switches CUDA graphs off",
    "-O": "--enforce-eager switches CUDA graphs off",
    "--enable-lora": _PRESETS,
    "--lora-modules": _PRESETS,
    "--max-loras": _PRESETS,
    "--max-lora-rank": _PRESETS,
    "--enable-prompt-adapter": _PRESETS,
    "--prompt-adapters": _PRESETS,
    "--chat-template": _NO_CHAT,
    "--chat-template-content-format": _NO_CHAT,
    "--response-role": _NO_CHAT,
    "--return-tokens-as-token-ids": _NO_CHAT,
    "--enable-auto-tool-choice": _NO_CHAT,
    "--tool-call-parser": _NO_CHAT,
    "--tool-parser-plugin": _NO_CHAT,
    "--enable-reasoning": _NO_CHAT,
    "--reasoning-parser": _NO_CHAT,
    "--guided-decoding-backend": _NO_CHAT,
    "--logits-processor-pattern": _NO_CHAT,
    "--max-logprobs": "audio replies carry no log probabilities",
    "--task": "this server speaks; there is no other task",
    "--enable-prompt-tokens-details": "usage is in the headers and in the SSE done event",
    "--enable-server-load-tracking": "GET /load tells it at any time",
    "--disable-log-stats": "nothing is logged per interval; read /metrics",
    "--enable-sleep-mode": "stop the server to free the card",
    "--enable-ssl-refresh": "restart the server when certificates change",
    "--disable-frontend-multiprocessing": "use vllm.LLM to run the engine in your process",
    "--api-server-count": "start several servers behind a balancer",
    "--headless": "start one server per device",
    "--mm-processor-kwargs": "clips are prepared by the codec's own rules",
    "--disable-mm-processor-cache": "--no-enable-prefix-caching",
    "--allowed-media-domains": "--allow-ref-audio-urls",
    "--otlp-traces-endpoint": "read /metrics",
    "--collect-detailed-traces": "read /metrics",
    "--show-hidden-metrics-for-version": "read /metrics",
    "--use-v2-block-manager": "there is one block manager",
    "--preemption-mode": "preempted requests keep or swap their pages",
    "--rope-scaling": "edit config.json in a local copy and give its folder as --model",
    "--rope-theta": "edit config.json in a local copy and give its folder as --model",
    "--ignore-patterns": "a download takes the configuration and one copy of the weights",
    "--attention-backend": "there is one attention implementation per device",
    "--disable-cascade-attn": "there is one attention implementation per device",
    "--kv-transfer-config": "the KV cache stays in its process",
    "--prefix-caching-hash-algo": "blocks are hashed with BLAKE2b; --no-enable-prefix-caching turns sharing off",
    "--async-scheduling": "steps are scheduled one by one",
    "--stream-interval": "--stream-ramp, in audio frames",
    "--additional-config": "write the flags on the command line",
    "--decode-context-parallel-size": _NO_PARALLEL,
    "--enable-eplb": _NO_PARALLEL,
    "--node-rank": _NO_PARALLEL,
    "--structured-outputs-config": "audio has no text to constrain",
    "--logits-processors": "audio has no text to constrain",
    "--runner": "this server speaks; there is no other task",
    "--convert": "this server speaks; there is no other task",
    "--media-io-kwargs": "clips are prepared by the codec's own rules",
    "--uds": "--host and --port",
    "--log-config-file": "set VLLM_LOGGING_LEVEL",
    "--log-error-stack": "set VLLM_LOGGING_LEVEL",
    "--config": "write the flags on the command line",
}


def parse_serve_args(argv: Sequence[str] | None, *, prog: str | None = None) -> ServeArgs:
    """Parse the server's command line; a wrong flag ends the program with status 2."""
    parser = _make_parser(prog)
    namespace = parser.parse_args(normalize_flags(argv))
    return _collect_serve_args(parser, namespace)


def _make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Parser of the server's command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [MODEL] [flags]  (--help lists them)",
        description="Serve speech over an OpenAI-compatible API.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_serve_flags(parser)
    return parser


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Every flag of the server, and MODEL as an argument of its own."""
    parser.add_argument(
        "model_tag", nargs="?", metavar="MODEL", help="same as --model", default=None
    )
    _add_fields(parser.add_argument_group("HTTP server"), ServerConfig)
    add_engine_flags(parser)


def _collect_serve_args(
    parser: argparse.ArgumentParser, namespace: argparse.Namespace
) -> ServeArgs:
    """Configurations from what ``parser`` has parsed."""
    values = vars(namespace)
    try:
        server = ServerConfig(**_values_of(ServerConfig, values))
        envs.check()
        engine = parse_engine_config(
            {**values, "model": values["model"] or values["model_tag"]},
            audio_tokenizer_path=server.audio_tokenizer_path,
        )
        return ServeArgs(engine, server, tuple(values["ignored_flags"]))
    except ConfigError as error:
        parser.error(str(error))


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of ``EngineConfig``, and upstream's that have no field here."""
    for concern in dataclasses.fields(EngineConfig):
        part = get_type_hints(EngineConfig)[concern.name]
        _add_fields(parser.add_argument_group(f"engine: {concern.name}"), part)
    group = parser.add_argument_group("accepted without effect")
    group.set_defaults(ignored_flags=[])
    for flag, num_values in IGNORED_FLAGS.items():
        group.add_argument(
            flag, action=_Ignore, nargs=num_values, default=argparse.SUPPRESS, help="no effect"
        )
    for names in PARALLEL_SIZES:
        group.add_argument(
            *names,
            action=_OnlyOne,
            type=int,
            default=argparse.SUPPRESS,
            help="1 is the only value",
        )
    for flag, advice in REFUSED_FLAGS.items():
        parser.add_argument(
            *([flag, f"--no-{flag[2:]}"] if flag.startswith("--") else [flag]),
            action=_Refuse,
            nargs="*",
            default=argparse.SUPPRESS,
            const=advice,
            help=argparse.SUPPRESS,
        )


def parse_engine_config(
    values: dict[str, Any], *, audio_tokenizer_path: str | None = None
) -> EngineConfig:
    """Engine configuration from parsed flags; surplus names are left alone.

    Raises:
        ConfigError: a value is not allowed.
    """
    options: dict[str, Any] = {}
    for part in get_type_hints(EngineConfig).values():
        options.update(_values_of(part, values))
    if audio_tokenizer_path is not None:
        options["audio_tokenizer_type"] = audio_tokenizer_path
    return EngineConfig.from_options(**options)


def normalize_flags(argv: Sequence[str] | None) -> list[str] | None:
    """Dashes for underscores in flag names, which users of vLLM may write either way."""
    if argv is None:
        return None
    flags = []
    for word in argv:
        name, equals, value = word.partition("=")
        flags.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return flags


def _values_of(part: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    chosen = {f.name: values[f.name] for f in dataclasses.fields(part) if f.name in values}
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()
    }


def _add_fields(group: argparse._ArgumentGroup, part: type[Any]) -> None:
    hints = get_type_hints(part)
    for item in dataclasses.fields(part):
        group.add_argument(
            flag_name(item.name),
            *item.metadata.get("also", ()),
            default=list(item.default) if isinstance(item.default, tuple) else item.default,
            help=item.metadata["help"].replace("%", "%%"),
            **_argument_form(hints[item.name], dict(item.metadata)),
        )


def _argument_form(hint: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """How argparse reads a field of type ``hint``."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if metadata.get("json"):
        return {"type": _json_list, "metavar": "JSON"}
    if metadata.get("append"):
        return {"action": "append"}
    if get_origin(hint) is tuple:
        return {"nargs": "+", "type": get_args(hint)[0], "metavar": "VALUE"}
    if get_origin(hint) in (Union, UnionType):
        return _argument_form(
            next(kind for kind in get_args(hint) if kind is not NoneType), metadata
        )
    if get_origin(hint) is Literal:
        aliases = metadata.get("aliases", {})
        return {"choices": get_args(hint), "type": lambda text: aliases.get(text, text)}
    if metadata.get("thousands"):
        return {"type": _count}
    if metadata.get("size"):
        return {"type": _num_bytes, "metavar": "SIZE"}
    return {"type": hint}


def _count(text: str) -> int:
    """A whole number; ``8k`` is 8,000 and ``8K`` is 8,192, as upstream reads them."""
    match = re.fullmatch(r"(\d+)([kK]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number such as 8192, 8k or 8K")
    return int(match[1]) * {"": 1, "k": 1000, "K": 1024}[match[2]]


def _num_bytes(text: str) -> int:
    """A number of bytes; ``64M``, ``64MB`` and ``64MiB`` are all 64 · 2**20."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT])(?:i?B)?|B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes such as 64M or 1.5G")
    exponent = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * 1024**exponent)


def _json_list(text: str) -> list[str]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON list of strings, as '[\"*\"]'")
    return value


class _Ignore(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.ignored_flags = [*namespace.ignored_flags, option_string]


class _OnlyOne(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values != 1:
            parser.error(f"{option_string} {values} is not supported: {_NO_PARALLEL}")
        namespace.ignored_flags = [*namespace.ignored_flags, option_string]


class _Refuse(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string} is not supported: {self.const}")
