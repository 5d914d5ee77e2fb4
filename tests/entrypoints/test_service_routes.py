"""Health, load, queue and cancelling, over a socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest

from vllm.exceptions import InvalidRequestError

TEXT = "Hello there."
LIMIT_S = 100  # bounds a hang


@pytest.fixture
def in_background() -> Iterator[Callable[..., Future[httpx.Response]]]:
    with ThreadPoolExecutor(8) as pool:

        def speak(server: Any, **options: Any) -> Future[httpx.Response]:
            body = {"input": "a", "stream": False, **options.pop("body", {})}
            url = f"{server.url}/v1/audio/speech"
            return pool.submit(httpx.post, url, json=body, timeout=LIMIT_S, **options)

        yield speak


def cancel(server: Any, request_id: str, **options: Any) -> httpx.Response:
    return server.client.post("/cancel", json={"request_id": request_id}, **options)


def num_open(server: Any) -> int:
    return server.client.get("/load").json()["server_load"]


def test_health_of_a_ready_server(live: Any) -> None:
    health = live.client.get("/health")
    assert health.status_code == 200
    assert live.client.head("/health").status_code == 200
    body = health.json()
    assert body["vllm_backend"] == live.url
    assert body["model"] == "tts-test"
    assert body["sample_rate"] == 24_000
    assert body["available_voices"] == ["en_woman", "en_man", "de_man"]
    assert (body["max_inference_slots"], body["max_concurrent_connections"]) == (16, 32)
    assert set(body["stats"]) < set(live.client.get("/stats").json())


def test_health_of_an_engine_that_says_nothing(start_server: Any, fake_engine: Any) -> None:
    engine = fake_engine()
    server = start_server(engine)
    body = server.client.get("/health").json()
    assert (body["status"], body["vllm_healthy"]) == ("ok", True)
    engine.is_silent = True
    health = server.client.get("/health")
    assert health.status_code == 200
    assert (health.json()["status"], health.json()["vllm_healthy"]) == ("degraded", False)


def test_health_while_loading(start_server: Any, fake_engine: Any) -> None:
    engine = fake_engine()
    engine.may_start.clear()
    server = start_server(engine, wait_ready=False)
    health = server.client.get("/health")
    assert (health.status_code, health.headers["retry-after"]) == (503, "2")
    body = health.json()
    assert (body["status"], body["vllm_healthy"]) == ("not_ready", False)
    assert body["error"]["message"] == body["detail"]
    assert server.client.get("/status").json() == {"status": "not_ready"}
    assert cancel(server, "x").status_code == 503
    engine.may_start.set()


def test_a_full_server_refuses_at_once(
    start_server: Any, fake_engine: Any, in_background: Any
) -> None:
    server = start_server(fake_engine(holds_at=0, max_num_seqs=1))
    replies = [in_background(server, body={"request_id": "open"}) for _ in range(2)]
    server.wait_until(lambda: num_open(server) == 2)
    assert server.client.get("/status").json() == {
        "status": "at_capacity",
        "can_accept_requests": False,
        "connections": {"active": 2, "max": 2, "utilization_pct": 100.0},
        "inference": {"active": 1, "queued": 1, "max_slots": 1, "utilization_pct": 100.0},
    }
    refused = server.client.post("/v1/audio/speech", json={"input": "a"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert refused.json()["error"]["code"] == "overloaded"
    assert cancel(server, "open").json()["num_cancelled"] == 2
    assert [reply.result().status_code for reply in replies] == [499, 499]
    assert len(server.engine.seen) == 2
    assert server.client.get("/status").json()["status"] == "ready"


def test_queue_headers(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(holds_at=1, max_num_seqs=1))
    body = {"input": TEXT, "response_format": "pcm"}
    url = f"{server.url}/v1/audio/speech"
    ask = partial(httpx.stream, "POST", url, json=body, timeout=LIMIT_S)
    with ask() as one, ask() as two:
        assert [reply.headers["x-queue-position"] for reply in (one, two)] == ["0", "1"]
        assert one.headers["x-queue-status"] == "queue=0,active=1"
        assert two.headers["x-queue-status"] == "queue=1,active=1"


def test_the_queue_lists_ids_by_priority(
    start_server: Any, fake_engine: Any, in_background: Any
) -> None:
    engine = fake_engine(holds_at=0, max_num_seqs=1)
    server = start_server(engine, "--max-concurrent-connections", "8")
    for count, (name, priority) in enumerate((("a", 0), ("b", 3), ("c", 0), ("d", -3)), 1):
        in_background(server, body={"request_id": name, "priority": priority})
        server.wait_until(lambda count=count: num_open(server) == count)
    assert server.client.get("/queue").json() == {
        "pending_requests": ["d", "c", "b"],
        "queue_depth": 3,
    }
    assert engine.priorities == [0, 3, 0, -3]
    for name in "abcd":
        cancel(server, name)


def test_deadlines_reach_the_engine(start_server: Any) -> None:
    server = start_server(None, "--request-timeout", "9000")
    body = {"input": "a", "timeout_s": 4000}
    server.client.post("/v1/audio/speech", json=body, headers={"X-Request-Timeout": "7500.5"})
    later = {"X-Request-Timeout": "7000"}
    server.client.post("/v1/audio/speech", json={"input": "a"}, headers=later)
    first, second = server.engine.timeouts
    assert 3000 < first <= 4000, "what is left of the shortest"
    assert 6000 < second <= 7000


def test_the_texts_of_a_batch_share_its_deadline(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(max_num_seqs=1))
    items = [{"input": "a"}, {"input": "a"}, {"input": "a"}]
    limit = {"X-Request-Timeout": "5000"}
    server.client.post("/v1/audio/speech/batch", json={"items": items}, headers=limit)
    lefts = server.engine.timeouts
    assert lefts == sorted(lefts, reverse=True)
    assert len(set(lefts)) == 3, "one after the other"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/audio/speech", {"input": "a"}),
        ("/v1/audio/speech/batch", {"items": [{"input": "a"}]}),
        ("/generate/batch", [{"text": "a"}]),
    ],
)
def test_a_deadline_that_is_no_number_refuses_the_whole_request(
    live: Any, path: str, body: Any
) -> None:
    refused = live.client.post(path, json=body, headers={"X-Request-Timeout": "soon"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "X-Request-Timeout"


def test_cancel_ends_queued_and_running_requests(
    start_server: Any, fake_engine: Any, in_background: Any
) -> None:
    server = start_server(fake_engine(holds_at=0, max_num_seqs=1))
    headers = {"X-Request-Id": "mine"}
    running = in_background(server, headers=headers, body={"input": TEXT})
    server.wait_until(lambda: num_open(server) == 1)
    queued = in_background(server, headers=headers, body={"input": TEXT})
    server.wait_until(lambda: num_open(server) == 2)
    assert server.client.get("/queue").json()["pending_requests"] == ["mine-1"]
    reply = cancel(server, "mine")
    assert reply.json() == {"status": "cancelled", "request_id": "mine", "num_cancelled": 2}
    for ended in (running.result(), queued.result()):
        assert ended.status_code == 499
        assert ended.json()["error"]["code"] == "aborted"
    assert num_open(server) == 0
    gone = cancel(server, "mine")
    assert (gone.status_code, "not found" in gone.json()["detail"]) == (404, True)


def test_a_cancelled_stream_breaks_off(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(holds_at=1))
    body = {"input": TEXT, "response_format": "pcm", "request_id": "stream"}
    with server.client.stream("POST", "/v1/audio/speech", json=body) as reply:
        assert reply.headers["x-request-id"] == "stream"
        pieces = reply.iter_raw()
        next(pieces)
        assert cancel(server, "stream").status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            list(pieces)
    server.wait_until(lambda: num_open(server) == 0)


def test_cancel_needs_the_same_key(start_server: Any, fake_engine: Any, in_background: Any) -> None:
    server = start_server(fake_engine(holds_at=1), "--api-key", "one", "two")
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    reply = in_background(server, body={"input": TEXT, "request_id": "mine"}, headers=one)
    server.wait_until(lambda: server.engine.seen)
    assert cancel(server, "mine", headers=two).status_code == 404
    assert cancel(server, "mine", headers=one).status_code == 200
    assert reply.result().status_code == 499


def test_stats_count_what_was_let_in(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine())
    speak = {"input": "hello", "stream": False}
    server.client.post("/v1/audio/speech", json=speak)
    server.client.post("/v1/audio/speech", json={**speak, "voice": "nobody"})
    server.client.post("/v1/audio/speech", json={})
    server.engine.fail_before = InvalidRequestError("refused", param="input")
    server.client.post("/v1/audio/speech", json=speak)
    server.engine.fail_before = RuntimeError("broken")
    server.client.post("/v1/audio/speech", json=speak)
    stats = server.client.get("/stats").json()
    assert stats["total_requests"] == 2
    assert (stats["successful_requests"], stats["failed_requests"]) == (1, 1)
    assert (stats["concurrent_requests"], stats["peak_concurrent"]) == (0, 1)


def test_a_client_that_leaves_gives_its_place_back(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(holds_at=0))
    with server.asking({"input": "a"}):
        server.wait_until(lambda: num_open(server) == 1)
    server.wait_until(lambda: num_open(server) == 0)
    assert server.client.get("/stats").json()["failed_requests"] == 1


def test_a_request_without_audio_gives_its_place_back(start_server: Any) -> None:
    server = start_server()
    body = {"input": "a", "max_tokens": 8}
    assert server.client.post("/v1/audio/speech", json=body).status_code == 500
    assert num_open(server) == 0
    assert server.client.get("/stats").json()["failed_requests"] == 1
