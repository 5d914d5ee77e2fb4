"""What the log says of replies that end before their time."""

from __future__ import annotations

import logging

import pytest

from vllm.entrypoints.openai.errors import log_early_end
from vllm.exceptions import (
    EngineDeadError,
    EngineError,
    HiggsAudioError,
    InvalidRequestError,
    RequestAbortedError,
)


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (EngineError("the step failed"), logging.ERROR),
        (EngineDeadError("gone"), logging.ERROR),
        (RequestAbortedError("cancelled"), logging.INFO),
        (InvalidRequestError("the clip is no audio"), logging.INFO),
    ],
)
def test_only_the_servers_own_failures_are_logged_as_errors(
    error: HiggsAudioError, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        log_early_end(error, "r1")
    (record,) = caplog.records
    assert record.levelno == level
    assert str(error) in record.getMessage()
    assert record.request_id == "r1"
