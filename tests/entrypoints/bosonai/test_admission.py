"""The door: its limit, the order of the queue, ids, deadlines, and what is counted."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from vllm.entrypoints.bosonai.admission import Admission, Ticket, make_ticket, ticket_maker
from vllm.entrypoints.openai.protocol import SamplingOptions
from vllm.entrypoints.server_config import ServerConfig
from vllm.exceptions import InvalidRequestError, OverloadedError, RequestAbortedError


def make_admission(*, limit: int = 0, num_slots: int = 2) -> Admission:
    return Admission(limit, lambda: num_slots)


def enter(admission: Admission, name: str, **fields: Any) -> Ticket:
    ticket = Ticket(client_id=name, **fields)
    admission.enter(ticket)
    return ticket


def make_request(**headers: str) -> Request:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request(
        {
            "type": "http",
            "headers": pairs,
            "state": {"request_id": "from-header", "arrived_at": 0.0},
        }
    )


def queued_ids(admission: Admission) -> list[str]:
    return [ticket.request_id for ticket in admission.queued()]


def test_the_limit_is_twice_the_slots_by_default() -> None:
    admission = make_admission(num_slots=2)
    for index in range(4):
        enter(admission, str(index))
    with pytest.raises(OverloadedError, match=r"4 requests .*--max-concurrent-connections"):
        enter(admission, "4")
    assert admission.num_open == admission.counts.total == 4


def test_a_request_is_told_how_it_found_the_server() -> None:
    admission = make_admission(limit=9, num_slots=2)
    tickets = [enter(admission, name) for name in "abcd"]
    assert [ticket.position for ticket in tickets] == [0, 0, 1, 2]
    assert tickets[3].headers() == {
        "X-Queue-Status": "queue=2,active=2",
        "X-Queue-Position": "2",
    }
    assert tickets[3].num_open == 4


def test_a_free_slot_goes_to_the_smallest_priority_then_the_oldest() -> None:
    admission = make_admission(limit=9, num_slots=1)
    first = enter(admission, "first")
    for name, priority in (("late", 5), ("plain", 0), ("next", 0), ("urgent", -1)):
        enter(admission, name, priority=priority)
    assert queued_ids(admission) == ["urgent", "plain", "next", "late"]
    admission.leave(first, succeeded=True)
    assert queued_ids(admission) == ["plain", "next", "late"]


def test_a_request_that_the_engine_began_is_not_queued_and_the_one_expected_is() -> None:
    admission = make_admission(limit=9, num_slots=2)
    first, second, third = (enter(admission, name) for name in "abc")
    admission.start(first)
    admission.start(third)
    assert queued_ids(admission) == ["b"]
    assert admission.num_running == 2
    admission.leave(first, succeeded=True)
    assert second.is_running


def test_no_more_are_active_than_there_are_slots() -> None:
    """The engine gives a slot away before the last audio of a reply is decoded."""
    admission = make_admission(limit=9, num_slots=1)
    for name in "ab":
        admission.start(enter(admission, name))
    last = enter(admission, "c")
    assert admission.num_running == 1
    assert last.headers()["X-Queue-Status"] == "queue=1,active=1"
    assert (admission.num_open, last.num_open) == (3, 3)


def test_live_requests_of_one_id_get_suffixes_and_are_ended_together() -> None:
    admission = make_admission(limit=9, num_slots=1)
    tickets = [enter(admission, "same") for _ in range(3)]
    assert [ticket.request_id for ticket in tickets] == ["same", "same-1", "same-2"]
    assert admission.cancel("same-1", "") == [tickets[1]]
    assert list(admission.cancel("same", "")) == tickets
    assert all(ticket.is_cancelled for ticket in tickets)


def test_requests_of_another_key_cannot_be_cancelled() -> None:
    admission = make_admission()
    ticket = enter(admission, "mine", owner="key one")
    assert not admission.cancel("mine", "key two")
    assert not ticket.is_cancelled
    assert "key one" not in repr(ticket)


def test_counts() -> None:
    admission = make_admission(limit=9)
    tickets = [enter(admission, name) for name in "abc"]
    admission.leave(tickets[0], succeeded=True)
    admission.leave(tickets[1], succeeded=False)
    counts = admission.counts
    assert (counts.total, counts.successful, counts.failed, counts.peak_concurrent) == (3, 1, 1, 3)
    assert counts.avg_generation_time_s == counts.generation_time_s > 0.0
    assert make_admission().counts.avg_generation_time_s == 0.0


def test_a_request_that_was_wrong_is_not_counted() -> None:
    admission = make_admission(limit=9, num_slots=1)
    wrong, waiting = enter(admission, "wrong"), enter(admission, "waiting")
    admission.withdraw(wrong)
    assert (admission.counts.total, admission.counts.failed, admission.num_open) == (1, 0, 1)
    assert waiting.is_running


@given(
    st.lists(st.one_of(st.integers(-2, 2), st.none()), max_size=40),
    st.integers(1, 4),
    st.integers(1, 8),
)
def test_no_more_than_the_slots_run_and_none_idles(
    events: list[int | None], num_slots: int, limit: int
) -> None:
    """A number is an arrival with that priority, None the end of the oldest running request."""
    admission = make_admission(limit=limit, num_slots=num_slots)
    live: list[Ticket] = []
    for event in events:
        if event is None:
            running = [ticket for ticket in live if ticket.is_running]
            if running:
                live.remove(running[0])
                admission.leave(running[0], succeeded=True)
        elif len(live) < limit:
            live.append(enter(admission, "x", priority=event))
        assert admission.num_running == min(num_slots, len(live))
        assert admission.num_running + len(admission.queued()) == admission.num_open == len(live)


def test_the_shortest_time_limit_counts() -> None:
    config = ServerConfig(request_timeout=30.0)
    raw = make_request(x_request_timeout="12.5")
    assert make_ticket(raw, config).timeout_s == 12.5
    assert make_ticket(raw, config, timeout_s=3.0).timeout_s == 3.0
    assert make_ticket(make_request(), config).timeout_s == 30.0
    unlimited = make_ticket(make_request(), ServerConfig())
    assert unlimited.timeout_s is unlimited.seconds_left is None


def test_a_time_limit_counts_from_arrival() -> None:
    now = time.monotonic()
    assert Ticket(client_id="late", timeout_s=5.0, arrived_at=now - 8.0).seconds_left == 0.0
    left = Ticket(client_id="early", timeout_s=5000.0, arrived_at=now - 8.0).seconds_left
    assert left is not None
    assert 0 < left <= 4992.0


@pytest.mark.parametrize("text", ["", "0", "0.0", "-1", "nan", "inf", "1e3", "soon", "1_0"])
def test_a_wrong_timeout_header_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="X-Request-Timeout") as refused:
        make_ticket(make_request(x_request_timeout=text), ServerConfig())
    assert refused.value.param == "X-Request-Timeout"


def test_the_id_in_the_body_goes_before_the_header() -> None:
    raw = make_request()
    assert make_ticket(raw, ServerConfig()).client_id == "from-header"
    assert make_ticket(raw, ServerConfig(), request_id="mine").client_id == "mine"


def test_the_key_matters_only_where_keys_are_needed() -> None:
    raw = make_request(authorization="Bearer abc")
    assert make_ticket(raw, ServerConfig(api_key=("abc",))).owner == "abc"
    assert make_ticket(raw, ServerConfig()).owner == ""


def test_items_of_a_cancelled_request_get_no_ticket() -> None:
    raw, admission = make_request(), make_admission(limit=9)
    ticket = ticket_maker(raw, ServerConfig())
    own = SamplingOptions(request_id="own")
    for item in (SamplingOptions(), SamplingOptions(), own):
        admission.enter(ticket(item))
    admission.cancel("from-header-1", "")
    admission.cancel("own", "")
    ticket(SamplingOptions())  # single items were ended, not the request
    admission.cancel("from-header", "")
    with pytest.raises(RequestAbortedError, match="cancelled"):
        ticket(SamplingOptions())
    assert ticket(own).client_id == "own"
