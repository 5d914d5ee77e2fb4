"""From timed replies to figures: percentiles, real-time factor, throughput, a virtual player.

Knows neither HTTP nor how requests were sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm.player import VirtualPlayer

__all__ = ["PERCENTILES", "Playback", "Result", "percentiles", "play", "summarize"]

PERCENTILES = (50, 90, 95, 99)
_NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Result:
    """One request; times in seconds from the moment it was sent."""

    arrivals: tuple[tuple[float, float], ...] = ()  # (time, seconds of audio) per chunk
    finished_s: float = 0.0
    failure: str | None = None  # its kind, as it is counted
    failure_detail: str = ""  # what the server said

    @property
    def first_audio_s(self) -> float | None:
        return self.arrivals[0][0] if self.arrivals else None

    @property
    def audio_s(self) -> float:
        return sum(seconds for _, seconds in self.arrivals)

    @property
    def rtf(self) -> float:
        """Processing seconds per audio second."""
        return self.finished_s / self.audio_s if self.audio_s else float("inf")


@dataclass(frozen=True)
class Playback:
    """How a player fares that starts at the first chunk."""

    num_underruns: int
    stalled_s: float


def play(arrivals: Sequence[tuple[float, float]]) -> Playback:
    """Play chunks ``(arrival time, audio seconds)`` as they come; a gap stops the player."""
    player = VirtualPlayer()
    for arrived_at, seconds in arrivals:
        player.feed(arrived_at, seconds)
    return Playback(len(player.stalls_s), sum(player.stalls_s))


def percentiles(values: Sequence[float], points: Sequence[int] = PERCENTILES) -> dict[str, float]:
    """``{"p50": ...}`` by linear interpolation; empty without values."""
    if not len(values):
        return {}
    numbers = np.percentile(np.asarray(values, np.float64), points)
    return {f"p{point}": float(number) for point, number in zip(points, numbers, strict=True)}


def summarize(results: Sequence[Result], wall_s: float) -> dict[str, Any]:
    """Figures of one load point; a failed request counts as a failure and nowhere else."""
    good = [result for result in results if result.failure is None]
    playbacks = [play(result.arrivals) for result in good]
    first_audio = [result.first_audio_s for result in good if result.first_audio_s is not None]
    rtf = percentiles([result.rtf for result in good])
    audio_s = sum(result.audio_s for result in good)
    return {
        "num_requests": len(results),
        "num_failures": len(results) - len(good),
        "failures": dict(Counter(r.failure for r in results if r.failure is not None)),
        "failure_examples": _failure_examples(results),
        "wall_s": wall_s,
        "time_to_first_audio_s": percentiles(first_audio),
        "latency_s": percentiles([result.finished_s for result in good]),
        "rtf": rtf,
        "audio_s": audio_s,
        "audio_s_per_s": audio_s / wall_s,
        "requests_per_s": len(good) / wall_s,
        "num_underruns": sum(playback.num_underruns for playback in playbacks),
        "num_requests_with_underruns": sum(playback.num_underruns > 0 for playback in playbacks),
        "stalled_s": sum(playback.stalled_s for playback in playbacks),
        "is_realtime_capable": bool(rtf) and rtf["p95"] < 1.0,
    }


def _failure_examples(results: Sequence[Result]) -> list[str]:
    failed = [result for result in results if result.failure is not None]
    return [
        f"{result.failure}: {result.failure_detail}" if result.failure_detail else result.failure
        for result in failed[:_NUM_EXAMPLES]
        if result.failure is not None
    ]
