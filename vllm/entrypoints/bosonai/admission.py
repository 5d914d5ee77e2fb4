"""Who may speak now: the limit on open requests, their order, their ends, and how many there were.

Mirrors the engine's own rule (priority, then arrival, ``max_num_seqs`` at a time), so that a
client can be told its place; requests are never held back here. Knows neither audio nor routes.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.entrypoints.bosonai.request_log import SpeechRecord
from vllm.exceptions import InvalidRequestError, OverloadedError, RequestAbortedError

if TYPE_CHECKING:
    from starlette.requests import Request

    from vllm.entrypoints.openai.protocol import SamplingOptions
    from vllm.entrypoints.server_config import ServerConfig

__all__ = [
    "QUEUE_HEADERS",
    "Admission",
    "RequestCounts",
    "Ticket",
    "make_ticket",
    "owner_of",
    "ticket_maker",
]

QUEUE_HEADERS = ("X-Queue-Status", "X-Queue-Position")
_TIMEOUT_HEADER = "X-Request-Timeout"
_RETRY_AFTER_S = 5.0
_NO_CACHE = re.compile(r"\bno-(cache|store)\b", re.IGNORECASE)


@dataclass(kw_only=True, eq=False)
class Ticket:
    """One request in the eyes of the door: what its client asked for, and where it stands.

    The first seven fields are the client's; the others are set by ``Admission``.
    """

    client_id: str
    owner: str = field(default="", repr=False)  # the key it came with, where keys are needed
    priority: int = 0  # smaller is sooner
    timeout_s: float | None = None  # from arrived_at
    engine_id: str = ""
    uses_cache: bool = True  # of finished replies
    arrived_at: float = field(default_factory=time.monotonic)

    request_id: str = ""  # client_id, with a suffix where another live request has it
    arrival: int = 0
    entered_at: float = 0.0  # monotonic clock
    position: int = 0  # in the queue at arrival, from 1; 0 started at once
    num_running: int = 0  # at arrival, this one included
    num_queued: int = 0  # at arrival, this one included
    num_open: int = 0  # running and queued requests at arrival, this one included
    is_running: bool = False
    has_begun: bool = False  # the engine's word, where is_running is a forecast
    cancelled_as: str = ""  # the id by which it was cancelled
    record: SpeechRecord = field(default_factory=SpeechRecord, repr=False)  # for the log

    @property
    def is_cancelled(self) -> bool:
        return bool(self.cancelled_as)

    @property
    def seconds_left(self) -> float | None:
        """What is left of the time limit; None where there is none."""
        if self.timeout_s is None:
            return None
        return max(0.0, self.timeout_s - (time.monotonic() - self.arrived_at))

    def headers(self) -> dict[str, str]:
        """What the client is told of the queue."""
        status = f"queue={self.num_queued},active={self.num_running}"
        return dict(zip(QUEUE_HEADERS, (status, str(self.position)), strict=True))


@dataclass
class RequestCounts:
    """Synthesis requests since the start, over all routes; refused ones are not among them."""

    total: int = 0
    successful: int = 0
    failed: int = 0
    generation_time_s: float = 0.0  # of the successful ones
    peak_concurrent: int = 0

    @property
    def avg_generation_time_s(self) -> float:
        """Mean over the successful requests; 0 when there was none."""
        return self.generation_time_s / self.successful if self.successful else 0.0


class Admission:
    """All open requests of the server.

    Args:
        limit: running and queued requests that are let in; 0 is twice the slots.
        num_slots: requests that the engine runs together, once it is known.
    """

    def __init__(self, limit: int, num_slots: Callable[[], int]) -> None:
        self._limit = limit
        self._num_slots = num_slots
        self._open: dict[str, Ticket] = {}
        self._num_arrivals = 0
        self.counts = RequestCounts()

    @property
    def num_slots(self) -> int:
        return self._num_slots()

    @property
    def limit(self) -> int:
        """Requests that may be open at a time."""
        return self._limit or 2 * self.num_slots

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_running(self) -> int:
        """Slots in use. A reply whose last audio is under way may have given its slot away."""
        return min(self.num_slots, sum(ticket.is_running for ticket in self._open.values()))

    def queued(self) -> list[Ticket]:
        """Requests that have not started, the next one first."""
        waiting = [ticket for ticket in self._open.values() if not ticket.is_running]
        return sorted(waiting, key=_order)

    def check_room(self) -> None:
        """Raises OverloadedError when no further request is let in."""
        if self.num_open >= self.limit:
            raise OverloadedError(
                f"{self.limit} requests are running or queued, which is all that this server "
                "takes (--max-concurrent-connections); try again later",
                retry_after_s=_RETRY_AFTER_S,
            )

    def enter(self, ticket: Ticket) -> None:
        """Let a request in; ``leave`` must follow.

        Raises:
            OverloadedError: the server is full.
        """
        self.check_room()
        ticket.request_id = self._unique(ticket.client_id)
        ticket.arrival = self._num_arrivals
        ticket.entered_at = time.monotonic()
        self._num_arrivals += 1
        self._open[ticket.request_id] = ticket
        self._fill_slots()
        queue = self.queued()
        ticket.num_queued = len(queue)
        ticket.num_running = self.num_running
        ticket.num_open = self.num_open
        ticket.position = 0 if ticket.is_running else queue.index(ticket) + 1
        self.counts.total += 1
        self.counts.peak_concurrent = max(self.counts.peak_concurrent, self.num_open)

    def pass_by(self, ticket: Ticket) -> None:
        """Tell a request that is answered without the engine how it found the server."""
        ticket.num_queued = len(self.queued())
        ticket.num_running = self.num_running + 1
        ticket.num_open = self.num_open + 1

    def start(self, ticket: Ticket) -> None:
        """The engine has started this request, whatever was expected.

        One that came at the same time and was expected to run is queued then, after all.
        """
        ticket.has_begun = ticket.is_running = True
        running = [each for each in self._open.values() if each.is_running]
        expected = sorted((each for each in running if not each.has_begun), key=_order)
        num_begun = len(running) - len(expected)
        for each in expected[max(0, self.num_slots - num_begun) :]:
            each.is_running = False

    def leave(self, ticket: Ticket, *, succeeded: bool) -> None:
        """A request has ended; its slot goes to the next one."""
        del self._open[ticket.request_id]
        self._fill_slots()
        if succeeded:
            self.counts.successful += 1
            self.counts.generation_time_s += time.monotonic() - ticket.entered_at
        else:
            self.counts.failed += 1

    def withdraw(self, ticket: Ticket) -> None:
        """A request turned out to be wrong before it began; it counts as one that never came."""
        del self._open[ticket.request_id]
        self._fill_slots()
        self.counts.total -= 1

    def cancel(self, request_id: str, owner: str) -> Sequence[Ticket]:
        """Mark every open request of that id and owner as cancelled; returns them."""
        found = [
            ticket
            for ticket in self._open.values()
            if request_id in (ticket.client_id, ticket.request_id) and ticket.owner == owner
        ]
        for ticket in found:
            ticket.cancelled_as = request_id
        return found

    def _fill_slots(self) -> None:
        free = self.num_slots - self.num_running
        for ticket in self.queued()[: max(0, free)]:
            ticket.is_running = True

    def _unique(self, client_id: str) -> str:
        unique, suffix = client_id, 1
        while unique in self._open:
            unique, suffix = f"{client_id}-{suffix}", suffix + 1
        return unique


def _order(ticket: Ticket) -> tuple[int, int]:
    return ticket.priority, ticket.arrival


def make_ticket(
    raw: Request,
    config: ServerConfig,
    *,
    request_id: str | None = None,
    priority: int | None = None,
    timeout_s: float | None = None,
) -> Ticket:
    """Ticket of an HTTP request and of what its body says.

    A ``request_id`` in the body goes before the header. Of the time limits (body, header and
    server) the shortest counts.

    Raises:
        InvalidRequestError: the timeout header is not a number of seconds above 0.
    """
    limits = (timeout_s, _header_timeout(raw), config.request_timeout)
    ticket = Ticket(
        client_id=request_id or raw.state.request_id,
        owner=owner_of(raw, config),
        priority=priority or 0,
        timeout_s=min(filter(None, limits), default=None),
        uses_cache=not _NO_CACHE.search(raw.headers.get("cache-control", "")),
        arrived_at=raw.state.arrived_at,
    )
    raw.scope["state"].setdefault("records", []).append(ticket.record)
    return ticket


def ticket_maker(raw: Request, config: ServerConfig) -> Callable[[SamplingOptions], Ticket]:
    """Makes the ticket of each item of a request that holds several; raises as ``make_ticket``.

    Once the request as a whole was cancelled by its id, items that share this id get no ticket but
    RequestAbortedError.
    """
    _header_timeout(raw)  # a wrong header is no item's fault
    of_the_whole: list[Ticket] = []

    def make(item: SamplingOptions) -> Ticket:
        if item.request_id is None and any(t.cancelled_as == t.client_id for t in of_the_whole):
            raise RequestAbortedError("the request was cancelled")
        ticket = make_ticket(
            raw,
            config,
            request_id=item.request_id,
            priority=item.priority,
            timeout_s=item.timeout_s,
        )
        if item.request_id is None:
            of_the_whole.append(ticket)
        return ticket

    return make


def owner_of(raw: Request, config: ServerConfig) -> str:
    """The key that a request came with; nothing where no keys are needed."""
    return raw.headers.get("authorization", "").partition(" ")[2].strip() if config.keys else ""


def _header_timeout(raw: Request) -> float | None:
    text = raw.headers.get(_TIMEOUT_HEADER)
    if text is None:
        return None
    # float() also takes "1_0" and "nan", which no client means
    seconds = float(text) if re.fullmatch(r"\d{1,9}(\.\d*)?|\.\d+", text.strip()) else math.nan
    if not seconds > 0:
        raise InvalidRequestError(
            f"{_TIMEOUT_HEADER}: {text[:40]!r} is not allowed; give seconds above 0",
            param=_TIMEOUT_HEADER,
        )
    return seconds
