"""The HTTP application: routes, middleware, life of the process (``python -m`` starts it).

Loads no torch: the engine lives in a process of its own. What a request means is decided in
``serving_audio``.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib import import_module
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware

import vllm
from vllm import envs
from vllm.audio import FORMATS
from vllm.entrypoints.bosonai.admission import QUEUE_HEADERS
from vllm.entrypoints.bosonai.api_document import DescribedApp
from vllm.entrypoints.bosonai.batch_speech import add_batch_routes
from vllm.entrypoints.bosonai.engine_host import EngineClient, EngineHost, HostState
from vllm.entrypoints.bosonai.middleware import (
    ApiKeyMiddleware,
    BodyRulesMiddleware,
    KeyLimitMiddleware,
    LastResortMiddleware,
    RequestIdMiddleware,
)
from vllm.entrypoints.bosonai.proxy_routes import PROXY_HEADERS, add_proxy_routes
from vllm.entrypoints.bosonai.reference_audio import ReferenceAudioLoader
from vllm.entrypoints.bosonai.request_log import RequestLogMiddleware
from vllm.entrypoints.bosonai.response_cache import CACHE_HEADERS, ResponseCache
from vllm.entrypoints.bosonai.service_routes import UNLIMITED_PATHS, add_service_routes
from vllm.entrypoints.bosonai.serving_audio import ServingAudio
from vllm.entrypoints.bosonai.serving_chat import ServingChat, add_chat_routes
from vllm.entrypoints.bosonai.serving_voices import (
    MULTIPART_PATHS,
    add_voice_routes,
    open_store,
)
from vllm.entrypoints.bosonai.speech_reply import END_HEADERS, FALLBACK_HEADER, START_HEADERS
from vllm.entrypoints.bosonai.synthesis import Synthesizer
from vllm.entrypoints.bosonai.tokenize_routes import add_tokenize_routes
from vllm.entrypoints.bosonai.voice_prefill import prefill_pinned
from vllm.entrypoints.bosonai.voices import VoiceLibrary, check_presets
from vllm.entrypoints.cli_args import ServeArgs, parse_serve_args
from vllm.entrypoints.openai.errors import install_error_handlers
from vllm.entrypoints.openai.protocol import AudioSpeechRequest
from vllm.entrypoints.openai.reply_bodies import ModelCard, ModelList, VersionReport
from vllm.entrypoints.openai.reply_docs import (
    Replies,
    bytes_of,
    error_replies,
    events_of,
    header_docs,
    json_reply,
)
from vllm.exceptions import ConfigError, ModelNotFoundError
from vllm.logger import configure_logging, get_logger
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.messages import EngineInfo
from vllm.v1.metrics import CONTENT_TYPE, SpeechMetrics

__all__ = ["EXPOSED_HEADERS", "build_app", "create_engine", "main", "run_server"]

logger = get_logger("vllm.server")  # the module is __main__ when it is run

_ENDING_S = 1.0  # of the grace after a signal, for replies to say that they are cut
_DEATH_NOTICE_S = 1.0  # /health answers 503 this long before the process ends
_CLIP_THREADS = 2
#: What scripts of other origins may read, which is all that is sent and not theirs to read anyway.
EXPOSED_HEADERS = (
    "X-Request-Id",
    "Retry-After",
    "X-Should-Retry",
    "X-Accel-Buffering",
    FALLBACK_HEADER,
    "WWW-Authenticate",
    "Allow",
    *QUEUE_HEADERS,
    *PROXY_HEADERS,
    *START_HEADERS,
    *END_HEADERS,
    *CACHE_HEADERS,
)

_SPEECH_REPLIES: Replies = {
    200: {
        "description": "Audio in the format asked for, or server-sent events",
        "content": {
            **bytes_of(*(audio_format.media_type for audio_format in FORMATS.values())),
            **events_of("speech.audio.delta", "speech.audio.done", "speech.audio.error"),
        },
        "headers": header_docs(
            (*START_HEADERS, *QUEUE_HEADERS), (*END_HEADERS, FALLBACK_HEADER, *CACHE_HEADERS)
        ),
    },
    **error_replies(400, 404, 499, 500, 503),
}
_METRICS_REPLIES: Replies = {
    200: {"description": "The page", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


def build_app(args: ServeArgs, host: EngineHost) -> FastAPI:
    """The application for one engine; starting and stopping it are part of its lifespan."""
    encoders = ThreadPoolExecutor(args.server.encoder_threads, thread_name_prefix="encoder")
    # Clips have threads of their own: a slow download must not hold up the audio of others.
    clips = ThreadPoolExecutor(_CLIP_THREADS, thread_name_prefix="clip")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(host.run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await host.close()
            for pool in (encoders, clips):
                pool.shutdown(wait=False, cancel_futures=True)

    has_docs = not args.server.disable_fastapi_docs
    app = DescribedApp(
        needs_key=bool(args.server.keys),
        title="higgs-audio-vllm",
        version=vllm.__version__,
        description="Text to speech over an OpenAI-compatible API.",
        lifespan=lifespan,
        openapi_url="/openapi.json" if has_docs else None,
    )
    install_error_handlers(app)
    _add_middleware(app, args)
    _add_version_route(app)
    size = args.server.response_cache
    cache = ResponseCache(size) if size else None
    metrics = SpeechMetrics(
        args.model_names[0],
        lambda: host.engine.engine_stats() if host.state is HostState.READY else None,
        cache.stats if cache is not None else None,
    )
    _add_metrics_route(app, metrics)
    _add_model_routes(app, args, host)
    loader = ReferenceAudioLoader(args.server, clips)
    synthesizer = Synthesizer(args.server, host, metrics)
    add_service_routes(app, args, host, synthesizer)
    speech = ServingAudio(args, synthesizer, encoders, loader, cache)
    _add_audio_routes(app, speech)
    add_voice_routes(app, host, clips)
    add_proxy_routes(app, args.server, speech, synthesizer)
    add_batch_routes(app, args.server, speech, synthesizer)
    chat = ServingChat(args, synthesizer, encoders, loader, speech)
    add_chat_routes(app, chat)
    add_tokenize_routes(app, args.server, host, speech, chat)
    return app


def _add_middleware(app: FastAPI, args: ServeArgs) -> None:
    """Innermost first: the one added last sees a request first."""
    config = args.server
    for path in config.middleware:
        _add_foreign_middleware(app, path)
    app.add_middleware(
        BodyRulesMiddleware, max_bytes=config.max_body_bytes, multipart_paths=MULTIPART_PATHS
    )
    if config.requests_per_minute or config.max_requests_per_key:
        app.add_middleware(
            KeyLimitMiddleware,
            per_minute=config.requests_per_minute,
            at_once=config.max_requests_per_key,
            free_paths=UNLIMITED_PATHS,
        )
    if config.keys:
        app.add_middleware(ApiKeyMiddleware, keys=config.keys)
    app.add_middleware(LastResortMiddleware)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.allowed_origins,
        allow_methods=config.allowed_methods,
        allow_headers=config.allowed_headers,
        allow_credentials=config.allow_credentials,
        expose_headers=EXPOSED_HEADERS,
    )
    if config.enable_log_requests:
        app.add_middleware(RequestLogMiddleware, max_text=config.max_log_len)
    app.add_middleware(RequestIdMiddleware)


def _add_foreign_middleware(app: FastAPI, path: str) -> None:
    module_name, _, name = path.rpartition(".")
    try:
        found: Any = getattr(import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--middleware {path}: {error}") from error
    if inspect.iscoroutinefunction(found):
        app.middleware("http")(found)
        return
    if not isinstance(found, type):
        raise ConfigError(f"--middleware {path}: neither a class nor an async function")
    factory: Any = found
    app.add_middleware(factory)


def _add_version_route(app: FastAPI) -> None:
    @app.get("/version", responses=json_reply(VersionReport))
    async def version() -> dict[str, str]:
        return {"version": vllm.__version__}


def _add_metrics_route(app: FastAPI, metrics: SpeechMetrics) -> None:
    @app.get("/metrics", response_class=Response, responses=_METRICS_REPLIES)
    async def metrics_page() -> Response:
        """Counters and histograms in Prometheus' text form."""
        return Response(metrics.render(), media_type=CONTENT_TYPE)


def _add_model_routes(app: FastAPI, args: ServeArgs, host: EngineHost) -> None:
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        info = host.engine.info
        limit = info.max_model_len if info else args.engine.model.max_model_len
        fields = {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "vllm",
            "root": args.engine.model.model or args.model_names[0],
            "parent": None,
            "max_model_len": limit,
            "permission": [],
        }
        if args.engine.notice:
            fields["description"] = args.engine.notice
        return fields

    @app.get("/v1/models", responses=json_reply(ModelList))
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in args.model_names]}

    @app.get(
        "/v1/models/{model_id:path}",
        responses={**json_reply(ModelCard), **error_replies(404)},
    )
    async def retrieve_model(model_id: str) -> dict[str, Any]:
        if model_id not in args.model_names:
            raise ModelNotFoundError(
                f"The model {model_id!r} does not exist; served here: {', '.join(args.model_names)}"
            )
        return card(model_id)


def _add_audio_routes(app: FastAPI, serving: ServingAudio) -> None:
    @app.post("/v1/audio/speech", response_class=Response, responses=_SPEECH_REPLIES)
    async def create_speech(body: AudioSpeechRequest, raw: Request) -> Response:
        """Speak a text."""
        return await serving.create_speech(body, raw)


def create_engine(args: ServeArgs) -> EngineClient:
    """The real engine, not yet started.

    Raises:
        ConfigError: the presets folder, the default voice or the voice store is wrong.
    """
    server = args.server
    check_presets(args.engine, server.presets_folder, default_voice=server.default_voice)
    store = open_store(server)

    def make_voices(info: EngineInfo) -> VoiceLibrary:
        return VoiceLibrary.for_engine(
            info,
            folder=server.presets_folder,
            store=store,
            default_voice=server.default_voice,
            pinned_voices=server.named_voices,
            refresh_interval_s=server.voice_presets_refresh_interval,
        )

    return AsyncLLM(args.engine, make_voices)


def run_server(args: ServeArgs) -> int:
    """Serve until a signal or the engine's death; returns the exit status."""
    configure_logging()
    _log_start(args)
    exit_status = 0

    def on_fatal() -> None:
        nonlocal exit_status
        exit_status = 1
        if envs.VLLM_KEEP_ALIVE_ON_ENGINE_DEATH:
            return
        asyncio.get_running_loop().call_later(_DEATH_NOTICE_S, _stop)

    def _stop() -> None:
        server.should_exit = True

    try:
        host = EngineHost(
            lambda: create_engine(args),
            restart=args.server.restart_engine,
            prepare=partial(
                prefill_pinned,
                names=args.server.prefilled_voices,
                block_size=args.engine.cache.block_size,
            ),
            on_ready=lambda: _log_ready(args, listener),
            on_fatal=on_fatal,
        )
        app = build_app(args, host)
        listener = _bind(args)
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    server = _Server(_uvicorn_config(app, args), host, grace_s=args.server.shutdown_timeout)
    signal.signal(signal.SIGTERM, _exit_quietly)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        return 130
    except SystemExit as ending:
        return exit_status or int(ending.code or 0)
    return exit_status


class _Server(uvicorn.Server):
    """uvicorn, ending open requests in good order when they outlast the grace after a signal."""

    def __init__(self, config: uvicorn.Config, host: EngineHost, *, grace_s: float) -> None:
        super().__init__(config)
        self._host = host
        self._patience_s = max(0.0, grace_s - _ENDING_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_open_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    async def _end_open_requests(self) -> None:
        await asyncio.sleep(self._patience_s)
        await self._host.close()


def _exit_quietly(_signal: int, _frame: FrameType | None) -> None:
    """uvicorn raises the signal once more after it has stopped; that is a clean end."""
    raise SystemExit(0)


def _log_start(args: ServeArgs) -> None:
    for flag in args.ignored_flags:
        logger.info("%s is accepted and has no effect", flag)
    if args.engine.device.enforce_eager and args.engine.device.device == "cpu":
        logger.info("--enforce-eager is accepted and has no effect on the CPU")
    names = ", ".join(args.model_names)
    notice = f" ({args.engine.notice})" if args.engine.notice else ""
    logger.info("higgs-audio-vllm %s serves %s%s", vllm.__version__, names, notice)


def _bind(args: ServeArgs) -> socket.socket:
    """A listening socket; it accepts once the application has started.

    Raises:
        ConfigError: the address cannot be had.
    """
    host, port = args.server.host or "0.0.0.0", args.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, since asyncio sends small packets at once on no other protocol: without it a reply's
    # second packet waits 40 ms for the client to acknowledge the first.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose --host or --port"
        ) from error
    logger.info(
        "listening on %s:%d; /health is 503 until the model is ready", *listener.getsockname()[:2]
    )
    return listener


def _log_ready(args: ServeArgs, listener: socket.socket) -> None:
    """Say where requests are served, in the words that scripts for such servers wait for."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if args.server.ssl_certfile else "http"
    shown = f"[{host}]" if ":" in host else host
    logger.info("Uvicorn running on %s://%s:%d (Press CTRL+C to quit)", scheme, shown, port)


def _uvicorn_config(app: FastAPI, args: ServeArgs) -> uvicorn.Config:
    config = args.server
    return uvicorn.Config(
        app,
        log_level=config.uvicorn_log_level,
        access_log=not config.disable_uvicorn_access_log,
        timeout_keep_alive=math.ceil(envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE),
        timeout_graceful_shutdown=max(1, round(config.shutdown_timeout)),
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=config.ssl_cert_reqs,
        root_path=config.root_path,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and serve."""
    args = parse_serve_args(sys.argv[1:] if argv is None else argv)
    return run_server(args)


if __name__ == "__main__":
    sys.exit(main())
