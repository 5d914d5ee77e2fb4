"""Which rows a decode step computes while somebody is about to hear silence.

Knows requests, their listeners and how long steps took; nothing of blocks and queues.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from vllm.v1.request import Request

__all__ = ["RowTurns"]

_LEAD_S = 2.0  # audio ahead of a listener with which a row can wait: a chunk and its context
_NUM_TURNS = 4  # of the rows that can wait, one in so many is in a step
_STEPS_PER_CHECK = 16  # one in so many steps is over all rows, to learn how long that takes
_WORTHWHILE = 0.75  # of a whole step's time, which a partial one must stay below
_SMOOTHING = 0.5  # weight of the newest duration
_FORGETTING = 0.995  # what a partial step is remembered to take fades, so that it is tried again


class RowTurns:
    """Lets rows that can wait take turns, so that the others advance faster.

    A decode step makes one frame of each of its rows. While a step over all rows takes no longer
    than a frame plays, nobody falls behind and all rows are in every step. When it takes longer,
    the device is saturated: rows whose listener has less than ``_LEAD_S`` of audio ahead
    are in every step, and the others, which nobody hears or which are far ahead, take turns. That
    goes on only as long as smaller steps really are shorter ones.

    Of the rows that take turns, those go first that have not been in a step for longest, so that
    none waits for more steps than there are rows.

    Args:
        frame_s: seconds that a frame plays.
    """

    def __init__(self, frame_s: float) -> None:
        self._frame_s = frame_s
        self._num_choices = 1
        self.is_whole = True  # whether the step chosen last is over all rows
        self._whole_step_s = 0.0
        self._partial_step_s = 0.0

    def choose(self, running: Collection[Request], now: float) -> list[Request] | None:
        """The rows of the next decode step, in the order of ``running``; None for all of them."""
        chosen = self._choose(running, now) if self._is_worthwhile() else None
        self.is_whole = chosen is None
        return chosen

    def record(self, step_s: float) -> None:
        """Note how long the step took that was chosen last."""
        if self.is_whole:
            self._whole_step_s += _SMOOTHING * (step_s - self._whole_step_s)
            self._partial_step_s *= _FORGETTING
        else:
            self._partial_step_s += _SMOOTHING * (step_s - self._partial_step_s)

    def _is_worthwhile(self) -> bool:
        is_saturated = self._whole_step_s > self._frame_s
        return is_saturated and self._partial_step_s < _WORTHWHILE * self._whole_step_s

    def _choose(self, running: Collection[Request], now: float) -> list[Request] | None:
        self._num_choices += 1
        patient = [request for request in running if self._spare_s(request, now) >= _LEAD_S]
        if len(patient) in (0, len(running)) or self._num_choices % _STEPS_PER_CHECK == 0:
            return None
        for request in running:
            request.last_turn = request.last_turn or self._num_choices - 1  # behind all others
        patient.sort(key=_last_turn)
        left_out = set(patient[math.ceil(len(patient) / _NUM_TURNS) :])
        chosen = [request for request in running if request not in left_out]
        for request in chosen:
            request.last_turn = self._num_choices
        return chosen

    def _spare_s(self, request: Request, now: float) -> float:
        """Seconds until the listener has played all that has been made; no end without one."""
        player = request.player
        if player is None or player.dry_at is None:
            return math.inf
        unheard_s = request.num_unsent_frames * self._frame_s / player.speed
        return player.dry_at + unheard_s - now


def _last_turn(request: Request) -> int:
    return request.last_turn
