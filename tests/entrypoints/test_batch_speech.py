"""``/v1/audio/speech/batch``: a result per item, in order, whatever the others do."""

from __future__ import annotations

import base64
from typing import Any

import pytest

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
