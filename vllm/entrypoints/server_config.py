"""The HTTP server's own configuration: where it listens, whom it lets in, which voices it offers.

Flags are made from the fields by ``cli_args``. What can be wrong with a value is found here, before
anything is started; nothing is started here.
"""

from __future__ import annotations

import math
import re
import ssl
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from vllm import envs
from vllm.exceptions import ConfigError

__all__ = ["ALL_VOICES", "BUCKET_SCHEME", "NO_STORE", "ServerConfig", "flag_name"]

ALL_VOICES, NO_VOICES = "all", "none"  # values of --pinned-voices
NO_STORE = "none"  # value of --voice-store
BUCKET_SCHEME = "s3://"  # begins values of --voice-store
_BUCKET_URL = re.compile(rf"{BUCKET_SCHEME}[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9](/[^?#]*)?")


_MIN_CACHE_BYTES = 2**20  # a minute of mp3; less keeps nothing worth a cache
_NOT_NEGATIVE = (
    "request_timeout",
    "shutdown_timeout",
    "max_concurrent_connections",
    "max_stored_voices",
    "requests_per_minute",
    "max_requests_per_key",
    "max_input_chars",
    "max_log_len",
)
_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^/\s]+")
_METHOD = re.compile(r"[A-Z]+")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def flag_name(field_name: str) -> str:
    """Flag of a field of a configuration."""
    return "--" + field_name.replace("_", "-")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _option(default: Any, help_text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **extra})


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP side: where it listens, whom it lets in, which voices it offers."""

    host: str | None = _option(None, "address to bind; default: all interfaces")
    port: int = _option(8000, "port to bind; 0 takes a free one")
    served_model_name: tuple[str, ...] = _option(
        (), "one or more names for the model; the first is reported; default: --model"
    )
    api_key: tuple[str, ...] = _option(
        (), "one or more keys that clients may send; default: VLLM_API_KEY, split at commas"
    )
    api_key_file: str | None = _option(None, "file of further keys, one a line")
    requests_per_minute: int = _option(
        0, "POST requests of one key in any minute; more get a 429; 0 is no limit"
    )
    max_requests_per_key: int = _option(
        0, "POST requests of one key at one time; more get a 429; 0 is no limit"
    )
    voice_presets_dir: str | None = _option(
        None, "folder with config.json and clips; default: the shipped voices"
    )
    voice_presets_refresh_interval: float = _option(
        10.0, "seconds between looks at the presets folder"
    )
    voice_store: str | None = _option(
        None,
        "folder or s3://BUCKET/PREFIX of uploaded voices, which servers may share; none refuses "
        "uploads; default: voices in the cache folder",
    )
    max_stored_voices: int = _option(1000, "uploaded voices that are kept")
    default_voice: str | None = _option(
        None, "voice of requests that name none; default: the presets' default"
    )
    pinned_voices: tuple[str, ...] = _option(
        (),
        "voices whose prompts are prefilled before the server is ready, and kept in the cache; "
        "all, none, or names; default: each is kept from its first use on",
    )
    audio_tokenizer_path: str | None = _option(
        None, "folder of the codec; goes before --audio-tokenizer-type"
    )
    restart_engine: bool = _option(False, "start a new engine process when one dies")
    request_timeout: float = _option(0.0, "seconds that a request may take; 0 is no limit")
    shutdown_timeout: float = _option(5.0, "seconds that open requests get to finish after SIGTERM")
    max_concurrent_connections: int = _option(
        0, "requests running and queued; more get a 503; 0 is twice --max-num-seqs"
    )
    max_input_chars: int = _option(100_000, "longest input of a request; 0 is no limit")
    max_body_mib: float = _option(32.0, "largest request body")
    response_cache: int = _option(
        0,
        "bytes of finished replies kept for equal seeded requests, as 64M or 1G; 0 keeps none",
        size=True,
    )
    encoder_threads: int = _option(2, "threads that encode and stretch audio")
    allow_ref_audio_urls: bool = _option(False, "fetch http(s) URLs given as ref_audio")
    allow_private_ref_audio_urls: bool = _option(
        False, "with --allow-ref-audio-urls: also from private and loopback addresses"
    )
    allowed_local_media_path: str | None = _option(
        None, "folder below which file:// URLs given as ref_audio are read"
    )
    uvicorn_log_level: Literal["debug", "info", "warning", "error", "critical", "trace"] = _option(
        "info", "log level of the HTTP server"
    )
    enable_log_requests: bool = _option(
        False,
        "one line of the log for each request that speaks, without texts and keys",
        also=("--log-requests",),
    )
    max_log_len: int = _option(
        0, "characters of a text that such a line shows as well; 0 shows none"
    )
    disable_uvicorn_access_log: bool = _option(False, "no line per request")
    disable_fastapi_docs: bool = _option(False, "no /docs, /redoc and /openapi.json")
    allow_credentials: bool = _option(False, "CORS: allow credentials")
    allowed_origins: tuple[str, ...] = _option(("*",), "CORS: origins, as a JSON list", json=True)
    allowed_methods: tuple[str, ...] = _option(("*",), "CORS: methods, as a JSON list", json=True)
    allowed_headers: tuple[str, ...] = _option(("*",), "CORS: headers, as a JSON list", json=True)
    ssl_keyfile: str | None = _option(None, "TLS key file")
    ssl_certfile: str | None = _option(None, "TLS certificate file")
    ssl_ca_certs: str | None = _option(None, "file of CA certificates for client certificates")
    ssl_cert_reqs: int = _option(0, "whether client certificates are required (ssl module)")
    root_path: str = _option("", "path prefix that a proxy in front strips")
    middleware: tuple[str, ...] = _option(
        (), "import path of an ASGI middleware; may be repeated", append=True
    )

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, f"--port {self.port}: 0 to 65535")
        _require(self.encoder_threads >= 1, f"--encoder-threads {self.encoder_threads}: at least 1")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"{flag_name(name)} {value}: 0 or more")
        for name in ("max_body_mib", "voice_presets_refresh_interval"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"{flag_name(name)} {value}: above 0")
        _require(
            self.response_cache == 0 or self.response_cache >= _MIN_CACHE_BYTES,
            f"--response-cache {self.response_cache}: 0, or at least 1M (bytes may end in K, M, G)",
        )
        _require(all(self.served_model_name), "--served-model-name '': a name must not be empty")
        is_word = not {ALL_VOICES, NO_VOICES}.isdisjoint(self.pinned_voices)
        _require(
            not is_word or len(self.pinned_voices) == 1,
            f"--pinned-voices {' '.join(self.pinned_voices)}: all and none stand alone",
        )
        self._check_keys()
        self._check_paths()
        self._check_cors()
        self._check_certificates()

    def _check_keys(self) -> None:
        _require(all(self.keys), "--api-key '': a key must not be empty")
        has_limits = self.requests_per_minute or self.max_requests_per_key
        _require(
            not has_limits or bool(self.keys),
            "limits per key need keys: --api-key, --api-key-file or VLLM_API_KEY",
        )

    def _check_paths(self) -> None:
        for name in ("voice_presets_dir", "audio_tokenizer_path", "allowed_local_media_path"):
            path = getattr(self, name)
            _require(
                not path or Path(path).is_dir(),
                f"{flag_name(name)} {path}: there is no such folder",
            )
        store = self.voice_store or ""
        _require(
            "://" not in store or _BUCKET_URL.fullmatch(store) is not None,
            f"--voice-store {store}: give a folder, s3://BUCKET/PREFIX or {NO_STORE}",
        )
        is_file = Path(store).expanduser().is_file()
        _require(not is_file, f"--voice-store {store}: is a file; give a folder, or none")
        root = self.root_path
        _require(
            not root or (root.startswith("/") and not root.endswith("/")),
            f"--root-path {root}: it begins with / and does not end with it, as /tts",
        )

    def _check_cors(self) -> None:
        """A value that no browser sends would switch CORS off in silence."""
        for flag, values, form, example in (
            ("--allowed-origins", self.allowed_origins, _ORIGIN, "https://example.org"),
            ("--allowed-methods", self.allowed_methods, _METHOD, "POST"),
            ("--allowed-headers", self.allowed_headers, _HEADER_NAME, "Authorization"),
        ):
            for value in values:
                _require(
                    value == "*" or form.fullmatch(value) is not None,
                    f"{flag} {value!r}: give * or such as {example}",
                )

    def _check_certificates(self) -> None:
        _require(
            bool(self.ssl_keyfile) == bool(self.ssl_certfile),
            "--ssl-keyfile and --ssl-certfile go together; one is missing",
        )
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(self, name)
            _require(
                not path or Path(path).is_file(), f"{flag_name(name)} {path}: there is no such file"
            )
        _require(
            self.ssl_cert_reqs in (0, 1, 2),
            f"--ssl-cert-reqs {self.ssl_cert_reqs}: 0 (none), 1 (optional) or 2 (required)",
        )
        asks_clients = bool(self.ssl_ca_certs) or self.ssl_cert_reqs > 0
        _require(
            not asks_clients or bool(self.ssl_certfile and self.ssl_ca_certs),
            "certificates of clients need --ssl-ca-certs, --ssl-certfile and --ssl-keyfile",
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            if self.ssl_certfile:
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
        except OSError as error:
            raise ConfigError(
                f"--ssl-certfile {self.ssl_certfile}, --ssl-keyfile {self.ssl_keyfile}: {error}"
            ) from error
        try:
            if self.ssl_ca_certs:
                context.load_verify_locations(self.ssl_ca_certs)
        except OSError as error:
            raise ConfigError(f"--ssl-ca-certs {self.ssl_ca_certs}: {error}") from error

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys that open the API, read once; none leaves it open to all."""
        given = (*(key.strip() for key in self.api_key), *_keys_in(self.api_key_file))
        if given:
            return given
        return tuple(key.strip() for key in (envs.VLLM_API_KEY or "").split(",") if key.strip())

    @property
    def prefilled_voices(self) -> tuple[str, ...]:
        """Names of voices to prefill at start, or ``ALL_VOICES`` alone."""
        return () if self.pinned_voices == (NO_VOICES,) else self.pinned_voices

    @property
    def named_voices(self) -> tuple[str, ...] | None:
        """The only voices that are pinned; None if all are."""
        return None if self.pinned_voices in ((), (ALL_VOICES,)) else self.prefilled_voices

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mib * 2**20)

    @property
    def presets_folder(self) -> Path | None:
        return Path(self.voice_presets_dir) if self.voice_presets_dir else None


def _keys_in(file_name: str | None) -> tuple[str, ...]:
    """Keys of a file; blank lines and those that begin with # are passed over."""
    if file_name is None:
        return ()
    try:
        lines = [line.strip() for line in Path(file_name).read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--api-key-file {file_name}: cannot be read: {error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {file_name}: holds no key")
    return keys
