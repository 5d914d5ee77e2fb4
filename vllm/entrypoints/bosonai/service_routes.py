"""Routes that tell and change the state of the service: health, load, queue, counts, cancelling.

Shapes are those that load balancers, the proxy's clients and older scripts read. Knows the open
requests by id only, and nothing of what they say.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from vllm.entrypoints.bosonai.admission import owner_of
from vllm.entrypoints.bosonai.engine_host import EngineHost, HostState
from vllm.entrypoints.bosonai.synthesis import Synthesizer
from vllm.entrypoints.openai.errors import to_response
from vllm.entrypoints.openai.reply_bodies import (
    Cancellation,
    HealthReport,
    LoadReport,
    QueueReport,
    StatsReport,
    StatusReport,
    UnwellReport,
)
from vllm.entrypoints.openai.reply_docs import Replies, error_replies, json_reply
from vllm.exceptions import HiggsAudioError

if TYPE_CHECKING:
    from vllm.entrypoints.cli_args import ServeArgs

__all__ = ["MODE", "UNLIMITED_PATHS", "CancelRequest", "add_service_routes"]

MODE = "vllm"  # how the proxy's replies name the engine that made them
#: What a key may ask for beyond its limits: whoever is at them must be able to end something.
UNLIMITED_PATHS = frozenset({"/cancel"})

_HEALTH_STATUS = {
    HostState.READY: "ok",
    HostState.LOADING: "not_ready",
    HostState.DEAD: "degraded",
}


_HEALTH_REPLIES: Replies = {
    **json_reply(HealthReport, "Requests are served"),
    503: {**error_replies(503)[503], "model": UnwellReport},
}
_PING_REPLIES: Replies = {
    200: {"description": "Requests are served", "content": {}},
    204: {"description": "The model is loading"},
    **error_replies(503),
}


class CancelRequest(BaseModel):
    """Body of ``POST /cancel``."""

    model_config = ConfigDict(strict=True)

    request_id: Annotated[str, Field(min_length=1, max_length=160, description="X-Request-Id")]


def add_service_routes(
    app: FastAPI, args: ServeArgs, host: EngineHost, synthesizer: Synthesizer
) -> None:
    """Add the routes for managers, balancers and clients that look at the queue."""
    _add_health_routes(app, args, host, synthesizer)
    _add_load_routes(app, host, synthesizer)
    _add_queue_routes(app, args, synthesizer)


def _add_health_routes(
    app: FastAPI, args: ServeArgs, host: EngineHost, synthesizer: Synthesizer
) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_class=JSONResponse, responses=_HEALTH_REPLIES)
    async def health(raw: Request) -> Response:
        """200 when requests are served, 503 while loading and when the engine is gone.

        An engine that is there and says nothing is degraded, and not healthy.
        """
        state = host.state
        is_ready = state is HostState.READY
        is_healthy = is_ready and await host.engine.probe()
        fields = {
            "status": "degraded" if is_ready and not is_healthy else _HEALTH_STATUS[state],
            "vllm_backend": str(raw.base_url).rstrip("/"),
            "vllm_healthy": is_healthy,
            "model": args.model_names[0],
            "mode": MODE,
            "stats": _counts(synthesizer),
            **_inference(synthesizer),
        }
        try:
            host.ready_engine()
        except HiggsAudioError as error:
            return _refusal(error, fields)
        return JSONResponse({**fields, **await _audio_facts(host)})

    @app.head("/ping", include_in_schema=False)
    @app.get("/ping", response_class=Response, responses=_PING_REPLIES)
    async def ping() -> Response:
        """200 when requests are served, 204 while loading, 503 when the engine is gone."""
        if host.state is HostState.LOADING:
            return Response(status_code=204)
        host.ready_engine()
        return Response()

    @app.get("/stats", responses=json_reply(StatsReport))
    async def stats() -> dict[str, Any]:
        """Synthesis requests over all routes since the start."""
        average = synthesizer.admission.counts.avg_generation_time_s
        return {**_counts(synthesizer), "avg_generation_time": round(average, 2)}


def _add_load_routes(app: FastAPI, host: EngineHost, synthesizer: Synthesizer) -> None:
    admission = synthesizer.admission

    @app.get("/status", responses=json_reply(StatusReport))
    async def status() -> dict[str, Any]:
        """Whether a balancer may send requests here, and how full the server is."""
        if host.state is not HostState.READY:
            return {"status": "not_ready"}
        has_room = admission.num_open < admission.limit
        return {
            "status": "ready" if has_room else "at_capacity",
            "can_accept_requests": has_room,
            "connections": {
                "active": admission.num_open,
                "max": admission.limit,
                "utilization_pct": _percent(admission.num_open, admission.limit),
            },
            "inference": {
                "active": admission.num_running,
                "queued": len(admission.queued()),
                "max_slots": admission.num_slots,
                "utilization_pct": _percent(admission.num_running, admission.num_slots),
            },
        }

    @app.get("/load", responses=json_reply(LoadReport))
    async def load() -> dict[str, int]:
        """Open synthesis requests, as vLLM's servers tell it."""
        return {"server_load": admission.num_open}


def _add_queue_routes(app: FastAPI, args: ServeArgs, synthesizer: Synthesizer) -> None:
    @app.get("/queue", responses=json_reply(QueueReport))
    async def queue() -> dict[str, Any]:
        """Ids of the requests that have not started, the next one first."""
        pending = [ticket.request_id for ticket in synthesizer.admission.queued()]
        return {"pending_requests": pending, "queue_depth": len(pending)}

    @app.post("/cancel", responses={**json_reply(Cancellation), **error_replies(400, 404, 503)})
    async def cancel(body: CancelRequest, raw: Request) -> dict[str, Any]:
        """End queued and running requests by their id; they must have come with the same key."""
        num_cancelled = await synthesizer.cancel(body.request_id, owner_of(raw, args.server))
        if not num_cancelled:
            raise HTTPException(
                404,
                f"Request {body.request_id} not found. It may have completed, or another key "
                "sent it.",
            )
        return {
            "status": "cancelled",
            "request_id": body.request_id,
            "num_cancelled": num_cancelled,
        }


def _counts(synthesizer: Synthesizer) -> dict[str, Any]:
    admission = synthesizer.admission
    counts = admission.counts
    return {
        "total_requests": counts.total,
        "successful_requests": counts.successful,
        "failed_requests": counts.failed,
        "total_generation_time": round(counts.generation_time_s, 2),
        "concurrent_requests": admission.num_open,
        "peak_concurrent": counts.peak_concurrent,
    }


def _inference(synthesizer: Synthesizer) -> dict[str, int]:
    admission = synthesizer.admission
    return {
        "active_connections": admission.num_open,
        "max_concurrent_connections": admission.limit,
        "active_inference": admission.num_running,
        "queued_inference": len(admission.queued()),
        "max_inference_slots": admission.num_slots,
    }


async def _audio_facts(host: EngineHost) -> dict[str, Any]:
    engine = host.engine
    assert engine.info is not None, "a ready engine has its info"
    assert engine.voices is not None, "a ready engine has its voices"
    # Uploads are not asked for: the health of this server is not that of its voice store.
    names = await asyncio.to_thread(engine.voices.preset_names)
    return {"sample_rate": engine.info.sample_rate, "available_voices": names}


def _refusal(error: HiggsAudioError, fields: dict[str, Any]) -> Response:
    """The usual reply of an error, with more in its body."""
    plain = to_response(error)
    headers = {"Retry-After": plain.headers["retry-after"]}
    return JSONResponse({**fields, **json.loads(bytes(plain.body))}, plain.status_code, headers)


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 1) if whole else 0.0
