"""Which replies are played while they are made, and how fast."""

from __future__ import annotations

from typing import Any

import pytest

SPEECH = {"input": "Hello.", "response_format": "pcm"}
CHAT = {"messages": [{"role": "user", "content": "Hello."}]}


@pytest.mark.parametrize(
    ("path", "body", "speed"),
    [
        ("/v1/audio/speech", SPEECH, 1.0),
        ("/v1/audio/speech", {**SPEECH, "speed": 2.0}, 2.0),
        ("/v1/audio/speech", {**SPEECH, "stream_format": "sse"}, 1.0),
        ("/v1/audio/speech", {**SPEECH, "stream": False}, None),
        ("/v1/chat/completions", {**CHAT, "stream": True, "audio": {"format": "pcm16"}}, 1.0),
        ("/v1/chat/completions", CHAT, None),
        ("/v1/audio/speech/batch", {"items": [SPEECH]}, None),
        ("/generate", {"text": "Hello."}, None),
    ],
)
def test_streams_are_played(
    live: Any, path: str, body: dict[str, Any], speed: float | None
) -> None:
    assert live.client.post(path, json=body).status_code == 200
    player = live.engine.players[-1]
    assert (player and player.speed) == speed
