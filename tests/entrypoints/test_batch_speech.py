"""``/v1/audio/speech/batch``: a result per item, in order, whatever the others do."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vllm.entrypoints.bosonai.batch_speech import with_defaults

URL = "/v1/audio/speech/batch"


def test_results(live: Any) -> None:
    items = [
        {"input": "hello", "response_format": "pcm", "seed": 3},
        {"input": "", "voice": "en_woman"},
        {"input": "hi", "voice": "nobody"},
        {"input": "hi", "response_format": "wav", "stream": True},
        {"input": 5},
        {},
    ]
    reply = live.client.post(URL, json={"items": items})
    assert reply.status_code == 200
    body = reply.json()
    assert (body["total"], body["succeeded"], body["failed"]) == (6, 2, 4)
    assert [each["index"] for each in body["results"]] == list(range(6))
    first, *_ = body["results"]
    assert (first["status"], first["media_type"], first["seed"]) == ("success", "audio/pcm", 3)
    assert len(base64.b64decode(first["audio_data"])) == 5 * 2 * 960 * 2
    assert first["usage"]["audio_tokens"] == 10
    assert first["stats"]["audio_duration_seconds"] == 0.4
    errors = {each["index"]: each["error"] for each in body["results"] if each["status"] == "error"}
    assert {index: error["param"] for index, error in errors.items()} == {
        1: "input",
        2: "voice",
        4: "input",
        5: "input",
    }
    assert errors[2]["code"] == "voice_not_found"


def test_the_audio_is_that_of_a_single_request(live: Any) -> None:
    item = {"input": "hello", "response_format": "wav", "seed": 3}
    alone = live.client.post("/v1/audio/speech", json={**item, "stream": False}).content
    batch = live.client.post(URL, json={"items": [item] * 3}).json()["results"]
    assert [base64.b64decode(each["audio_data"]) for each in batch] == [alone] * 3


def test_fields_beside_the_items_are_theirs_where_they_lack_them(
    start_server: Any, fake_engine: Any
) -> None:
    server = start_server(fake_engine())
    body = {
        "items": [{"input": "a"}, {"input": "b", "response_format": "wav", "seed": None}],
        "response_format": "flac",
        "seed": 3,
        "request_id": "whole",
    }
    reply = server.client.post(URL, json=body)
    results = reply.json()["results"]
    assert [each["media_type"] for each in results] == ["audio/flac", "audio/wav"]
    assert [each["seed"] for each in results] == [3, 3]
    assert reply.headers["x-request-id"] == "whole"
    assert all("-whole-" in request_id for _, _, request_id in server.engine.seen)
    wrong = server.client.post(URL, json={"items": [{"input": "a"}], "voice": "nobody"}).json()
    assert wrong["results"][0]["error"]["param"] == "voice"


@pytest.mark.parametrize(
    ("item", "shared", "expected"),
    [
        ({"max_new_tokens": 9}, {"max_tokens": 30}, {"max_new_tokens": 9}),
        ({"voice": "a"}, {"ref_audio": "AAAA", "ref_text": "b"}, {"voice": "a"}),
        (
            {"reference_audio_base64": "A", "reference_text": "b"},
            {"voice": "c"},
            {"reference_audio_base64": "A", "reference_text": "b"},
        ),
        ({"ras_win_len": None}, {"ras_window_length": 7}, {"ras_win_len": None}),
        ({"voice": None}, {"voice": "c"}, {"voice": "c"}),
    ],
)
def test_an_item_goes_before_its_batch(
    item: dict[str, Any], shared: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert with_defaults(item, shared) == expected


def test_a_cancelled_batch_starts_no_further_item(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(holds_at=0, max_num_seqs=1))
    with ThreadPoolExecutor(1) as pool:
        body = {"items": [{"input": "a"}] * 3, "request_id": "whole"}
        asked = pool.submit(server.client.post, URL, json=body)
        server.wait_until(lambda: len(server.engine.seen) == 1)
        reply = server.client.post("/cancel", json={"request_id": "whole"}).json()
        assert reply["num_cancelled"] == 1
        server.engine.go_on.set()
        results = asked.result().json()["results"]
    assert [each["error"]["code"] for each in results] == ["aborted"] * 3
    assert len(server.engine.seen) == 1


@pytest.mark.parametrize("items", [[], [{"input": "a"}] * 33, "a", ["a"]])
def test_a_wrong_body_is_refused_whole(live: Any, items: Any) -> None:
    reply = live.client.post(URL, json={"items": items})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "items"


def test_an_item_that_the_engine_fails(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine(fail_after=RuntimeError("broken")))
    result = server.client.post(URL, json={"items": [{"input": "a" * 20}]}).json()["results"][0]
    assert (result["status"], result["error"]["type"]) == ("error", "server_error")


def test_items_share_the_id_of_their_request(start_server: Any, fake_engine: Any) -> None:
    server = start_server(fake_engine())
    items = [{"input": "a"}, {"input": "b", "request_id": "own"}]
    reply = server.client.post(URL, json={"items": items}, headers={"X-Request-Id": "whole"})
    assert reply.headers["x-request-id"] == "whole"
    names = [request_id.split("-")[1] for _, _, request_id in server.engine.seen]
    assert names == ["whole", "own"]


def test_errors_name_fields_as_the_item_spelt_them(live: Any) -> None:
    item = {"input": "Hi.", "reference_audio_base64": "!", "reference_text": "a"}
    reply = live.client.post("/v1/audio/speech/batch", json={"items": [item]}).json()
    assert reply["results"][0]["error"]["param"] == "reference_audio_base64"
