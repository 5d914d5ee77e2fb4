"""A listener who plays a reply while it is still being made: when the audio runs out, how often.

Pure arithmetic on times that callers give; knows neither clocks nor samples.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Listener", "VirtualPlayer"]


@dataclass(frozen=True)
class Listener:
    """Someone who plays a reply while it is made, as the engine is told of them."""

    speed: float  # audio seconds played per second
    dry_at: float  # time.monotonic() at which nothing is left to play, or waiting began


class VirtualPlayer:
    """Starts with the first audio, plays on at real time, and stalls while nothing is buffered.

    Times are seconds of one clock that never goes back, the same for all calls.

    Args:
        speed: audio seconds played per second; above 1 the listener hears it faster.
        dry_at: when an earlier buffer is empty, for a listener who has heard something before.
    """

    def __init__(self, speed: float = 1.0, *, dry_at: float | None = None) -> None:
        assert speed > 0, speed
        self.speed = speed
        self.stalls_s: list[float] = []  # one for each underrun, in order
        self.dry_at = dry_at  # when the buffer is empty; None before the first audio
        self._is_over = False

    @property
    def has_started(self) -> bool:
        return self.dry_at is not None

    def feed(self, now: float, audio_s: float) -> None:
        """Put audio into the buffer: ``audio_s`` seconds of it, before the change of speed."""
        if audio_s <= 0:
            return
        self._count_stall(now)
        start = now if self.dry_at is None else max(now, self.dry_at)
        self.dry_at = start + audio_s / self.speed

    def end(self) -> None:
        """The audio is complete: an empty buffer is no underrun any more."""
        self._is_over = True

    def leave(self, now: float) -> None:
        """The listener leaves; a stall that still lasts is counted. Ending again changes nothing."""
        if not self._is_over:
            self._count_stall(now)
        self._is_over = True

    def _count_stall(self, now: float) -> None:
        if self.dry_at is not None and now > self.dry_at:
            self.stalls_s.append(now - self.dry_at)
