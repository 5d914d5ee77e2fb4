"""Closed-loop traffic on an engine in this process, and what its listeners get of it.

Every stream asks for its next reply when it has the last. Knows nothing of targets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vllm.outputs import FinishReason
from vllm.player import VirtualPlayer
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.messages import EngineCoreRequest

__all__ = ["Heard", "Traffic", "drive", "percentile"]


@dataclass
class Heard:
    """One reply, as it arrived."""

    sent_at: float
    player: VirtualPlayer = field(default_factory=VirtualPlayer)
    arrivals: list[float] = field(default_factory=list)  # of audio
    samples: bytearray = field(default_factory=bytearray, repr=False)  # float32
    codes: bytearray = field(default_factory=bytearray, repr=False)  # int16, delayed

    @property
    def first_audio_s(self) -> float:
        return self.arrivals[0] - self.sent_at


@dataclass
class Traffic:
    """All replies of some time."""

    replies: dict[str, Heard]
    seconds: float  # from the first request to the last audio
    sample_rate: int

    @property
    def audio_s(self) -> float:
        return sum(len(each.samples) for each in self.replies.values()) / 4 / self.sample_rate

    @property
    def num_underruns(self) -> int:
        return sum(len(each.player.stalls_s) for each in self.replies.values())

    def gaps_s(self) -> list[float]:
        """Times between chunks of one reply."""
        arrivals = [each.arrivals for each in self.replies.values()]
        return [gap for times in arrivals for gap in np.diff(times).tolist()]


def drive(
    core: EngineCore,
    make: Callable[[int], EngineCoreRequest],
    *,
    num_streams: int,
    num_requests: int,
    abort_after: Callable[[int], int | None] = lambda _: None,
) -> Traffic:
    """Serve ``num_requests``, so many at a time.

    Args:
        core: of the engine.
        make: the request of a number from 0 on.
        num_streams: that are open together.
        num_requests: in all.
        abort_after: delayed frames after which request ``n`` is aborted; None lets it end.

    Raises:
        RuntimeError: a request failed, so figures would mean nothing.
    """
    replies: dict[str, Heard] = {}
    limits: dict[str, int] = {}
    frame_bytes = 2 * core.info.num_codebooks
    num_open = 0

    def send() -> None:
        number = len(replies)
        request = make(number)
        limit = abort_after(number)
        if limit is not None:
            limits[request.request_id] = limit
        replies[request.request_id] = Heard(time.perf_counter())
        core.add_request(request)

    start = time.perf_counter()
    while num_open < min(num_streams, num_requests):
        send()
        num_open += 1
    while num_open:
        for output in core.step().outputs:
            now = time.perf_counter()
            if output.error is not None:
                raise RuntimeError(output.error)
            heard = replies[output.request_id]
            heard.codes += output.delayed_codes
            if output.audio:
                heard.arrivals.append(now)
                heard.samples += output.audio
                heard.player.feed(now, len(output.audio) / 4 / core.info.sample_rate)
            if output.finish_reason is not None:
                heard.player.end()
                num_open -= 1
                if len(replies) < num_requests:
                    send()
                    num_open += 1
            elif len(heard.codes) // frame_bytes >= limits.get(output.request_id, 1 << 30):
                del limits[output.request_id]
                core.abort_requests((output.request_id,), FinishReason.ABORT)
    return Traffic(replies, time.perf_counter() - start, core.info.sample_rate)


def percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent))
