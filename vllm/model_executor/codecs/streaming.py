"""Which frames to decode next so that a stream equals a one-shot decode, bit by bit.

Pure arithmetic on frame counts; knows neither codes nor samples nor time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

__all__ = ["DEFAULT_RAMP", "Window", "WindowPlan", "WindowShape"]

DEFAULT_RAMP = (4, 8, 16, 25)


class WindowShape(NamedTuple):
    """What the work of a decode depends on: so many frames, of which some are computed."""

    num_frames: int
    first: int
    last: int  # the first one behind them

    def holds(self, other: WindowShape) -> bool:
        """Whether all that ``other`` computes is computed here, of as many frames."""
        is_within = self.first <= other.first and other.last <= self.last
        return self.num_frames == other.num_frames and is_within


@dataclass(frozen=True)
class Window:
    """Frames ``[start, stop)`` to decode, of which ``[emit_start, emit_stop)`` are kept.

    start      emit_start        emit_stop      stop
      |  context   |   new samples   |  context   |
    """

    start: int
    stop: int
    emit_start: int
    emit_stop: int

    @property
    def num_frames(self) -> int:
        """Length of the decode."""
        return self.stop - self.start

    @property
    def num_emitted(self) -> int:
        """Frames whose samples are new."""
        return self.emit_stop - self.emit_start

    @property
    def shape(self) -> WindowShape:
        """Its frames counted from its own first one."""
        return WindowShape(
            self.num_frames, self.emit_start - self.start, self.emit_stop - self.start
        )


@dataclass(frozen=True)
class WindowPlan:
    """Chunk boundaries that grow by ``ramp`` (its last entry repeats), with exact context.

    Where a chunk begins and ends depends on the request's own frame count alone, never on when
    frames arrived: chunk i has fixed boundaries, its window reaches ``context`` frames further or
    to the last frame of the stream, whichever comes first. A chunk is due once all of its window
    exists, so early and late callers decode the same shapes and get the same bits.

    Attributes:
        context: frames on either side that a chunk's samples depend on.
        ramp: frames of the first, second, ... chunk; the last repeats.
        widens_last: windows that the end of a stream cuts short begin earlier instead, so that they
            have a length that others have. More context changes no sample.
    """

    context: int
    ramp: tuple[int, ...] = DEFAULT_RAMP
    widens_last: bool = False

    def __post_init__(self) -> None:
        if not self.ramp or min(self.ramp) < 1:
            raise ValueError(f"ramp={self.ramp!r} must hold frame counts of 1 or more")
        if self.context < 0:
            raise ValueError(f"context={self.context} must be 0 or more frames")

    def next_window(self, emitted: int, available: int, *, final: bool) -> Window | None:
        """The window that continues after ``emitted`` frames, or None if none is due.

        Args:
            emitted: frames whose samples are out; the ``emit_stop`` of the window before, or 0.
            available: frames that exist so far.
            final: no more frames will come.
        """
        if final and emitted >= available:
            return None
        boundary = self._boundary_after(emitted)
        if not final and available < boundary + self.context:
            return None
        start, stop = max(0, emitted - self.context), min(boundary + self.context, available)
        if self.widens_last and stop < boundary + self.context:
            start = self._widened(start, stop)
        return Window(
            start=start,
            stop=stop,
            emit_start=emitted,
            emit_stop=min(boundary, available),
        )

    @cached_property
    def window_lengths(self) -> tuple[int, ...]:
        """Frames of the windows that every long stream has, rising; its last may be others."""
        return tuple(sorted({shape.num_frames for shape in self._steady_shapes}))

    @cached_property
    def usual_shapes(self) -> tuple[WindowShape, ...]:
        """Shapes of these windows, and of each length one more, which holds every end of a stream.

        Behind the last frame there is no context, so what is emitted may reach as far as the window
        does; where it begins differs.
        """
        shapes = set(self._steady_shapes)
        for length in self.window_lengths:
            first = min(each.first for each in self._steady_shapes if each.num_frames == length)
            shapes.add(WindowShape(length, first, length))
        return tuple(sorted(shapes))

    @property
    def num_kept(self) -> int:
        """Frames before those that are out already that a later window may begin with."""
        return max(self.context, *self.window_lengths) if self.widens_last else self.context

    def next_due(self, available: int) -> int:
        """Frame count above ``available`` at which the next window becomes due."""
        return self._boundary_after(max(available - self.context, 0)) + self.context

    @cached_property
    def _steady_shapes(self) -> frozenset[WindowShape]:
        shapes, emitted = set(), 0
        while emitted <= sum(self.ramp) + self.context:
            window = self.next_window(emitted, 2**40, final=False)
            assert window is not None
            shapes.add(window.shape)
            emitted = window.emit_stop
        return frozenset(shapes)

    def _widened(self, start: int, stop: int) -> int:
        """The latest start up to ``start`` that gives a usual length; else ``start`` itself."""
        starts = (stop - length for length in self.window_lengths)
        return next((each for each in starts if 0 <= each <= start), start)

    def _boundary_after(self, emitted: int) -> int:
        boundary = 0
        for size in self.ramp:
            boundary += size
            if boundary > emitted:
                return boundary
        steady = self.ramp[-1]
        return boundary + ((emitted - boundary) // steady + 1) * steady
