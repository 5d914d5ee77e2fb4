"""The codes of recent chat replies, so that a later request can name one by its audio id.

Bounded in bytes and in time. Nothing that was promised is dropped early: a reply for which there
is no room is not kept, and its ``expires_at`` says so.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from vllm.prompts import SpokenTurn

__all__ = ["RecentReplies"]

KEPT_S = 3600
MAX_BYTES = 64 * 2**20  # about 46 hours of speech in Higgs Audio v2's codes


class _Kept(NamedTuple):
    turn: SpokenTurn
    owner: str
    num_bytes: int
    expires_at: int


class RecentReplies:
    """Replies by their audio id, each with the key of the client that made it.

    Args:
        max_bytes: of the codes.
        kept_s: seconds for which a reply is kept.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        max_bytes: int = MAX_BYTES,
        kept_s: int = KEPT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_bytes = max_bytes
        self._kept_s = kept_s
        self._clock = clock
        self._replies: OrderedDict[str, _Kept] = OrderedDict()  # the first expires first
        self._num_bytes = 0

    def keep(self, audio_id: str, turn: SpokenTurn, owner: str) -> int:
        """Keep a reply if there is room; returns when it will be gone, in seconds of the epoch."""
        self._drop_expired()
        assert turn.clip.codes is not None, "replies are kept as codes"
        num_bytes = turn.clip.codes.nbytes + len(turn.text.encode())
        if self._num_bytes + num_bytes > self._max_bytes:
            return int(self._clock())
        expires_at = int(self._clock()) + self._kept_s
        self._replies[audio_id] = _Kept(turn, owner, num_bytes, expires_at)
        self._num_bytes += num_bytes
        return expires_at

    def find(self, audio_id: str, owner: str) -> SpokenTurn | None:
        """The reply of that id and owner, unless it is gone."""
        self._drop_expired()
        kept = self._replies.get(audio_id)
        return kept.turn if kept is not None and kept.owner == owner else None

    def _drop_expired(self) -> None:
        now = self._clock()
        while self._replies:
            audio_id, kept = next(iter(self._replies.items()))
            if kept.expires_at > now:
                return
            del self._replies[audio_id]
            self._num_bytes -= kept.num_bytes
