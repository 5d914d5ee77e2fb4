"""Many ill-behaved clients on one server for minutes: failures, memory, leaked KV blocks, order.

Starts a server of its own on the small random model. Clients read to the end, read slowly, leave
in the middle or before the first byte, or have their request cancelled; a 429 or 503 is a refusal
by design, all else that goes wrong is a failure. The status is 1 when anything failed, leaked or
grew, or when requests overtook others that came before them.

    python -m benchmarks.soak --minutes 10

The order is that of arrival at the server. When a client has sent a request says little of it: where
client and server share a starved machine, one connection is set up and read 5 s sooner than another.
So somebody asks for the queue all the time. Of two requests of which the first was seen in the queue
before the second was sent, is as urgent or more, and had not been answered by then, the second must
not be answered before the first. A reply's headers come with its first audio; clients may see those of
two replies 1 s and the longest answer to a question about the queue apart, in any order. No pair may
be wrong. Without an order, half of them are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from benchmarks._report import format_table, write_json
from vllm.benchmarks.client import ENDPOINTS, TEXTS
from vllm.config import RANDOM_MODEL_NAME

START_LIMIT_S = 200.0
IDLE_LIMIT_S = 60.0
STOP_LIMIT_S = 60.0
REQUEST_LIMIT_S = 120.0
MAX_PAUSE_S = 1.0  # of a client that was refused
MAX_CANCEL_S = 20.0  # about as long as a request waits and speaks
MAX_GROWTH = 0.05
NUM_PARTS = 10  # of a run: minutes, when it is as long as it should be
# Replies that began closer to each other than this may be seen in any order. A turn out of order is
# off by more: the queue is long.
ORDER_GAP_S = 1.0
LOOK_EVERY_S = 0.2
URGENT = -1  # priority of one request in ten
BYTES_PER_FRAME = 2 * 960
OPEN_GAUGES = tuple(f"vllm:num_requests_{state}" for state in ("running", "waiting", "finishing"))
SERVER_FLAGS = ("--device", "cpu", "--max-num-seqs", "32", "--max-concurrent-connections", "160")


class Manner(StrEnum):
    """How a client treats its reply."""

    READ = "read"
    READ_SLOWLY = "read slowly"
    LEAVE_MIDWAY = "leave midway"
    LEAVE_EARLY = "leave early"
    CANCEL = "cancel"


WEIGHTS = {
    Manner.READ: 0.4,
    Manner.READ_SLOWLY: 0.15,
    Manner.LEAVE_MIDWAY: 0.2,
    Manner.LEAVE_EARLY: 0.15,
    Manner.CANCEL: 0.1,
}
REFUSED = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)
CANCELLED = 499


@dataclass(frozen=True)
class Turn:
    """When a request was sent, seen in the queue and answered, on the monotonic clock."""

    priority: int
    sent_at: float
    queued_at: float  # or soon after; infinite for one that was never seen there
    answered_at: float


def count_overtaken(turns: Sequence[Turn], gap_s: float = ORDER_GAP_S) -> tuple[int, int]:
    """Pairs of requests whose order is certain, and those of them that were answered the other way.

    A pair counts where the second was sent while the first, as urgent or more, was in the queue.
    Answers closer to each other than ``gap_s`` have no order.
    """
    num_pairs = num_wrong = 0
    for first in turns:
        for second in turns:
            is_certain = first.queued_at <= second.sent_at < first.answered_at
            if is_certain and first.priority <= second.priority:
                num_pairs += 1
                num_wrong += second.answered_at + gap_s <= first.answered_at
    return num_pairs, num_wrong


@dataclass
class Tally:
    """What has happened so far."""

    ended: Counter[str] = field(default_factory=Counter)  # as the client wanted, by manner
    refused: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    queued_at: dict[str, float] = field(default_factory=dict)  # by id, when first seen there
    turns: list[Turn] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)  # (s, bytes of all processes)
    longest_look_s: float = 0.0  # at the queue: clients and server together were as late as this


@dataclass(frozen=True)
class Outcome:
    """The end of a soak."""

    duration_s: float
    ended: dict[str, int]
    refused: dict[str, int]
    failures: dict[str, int]
    num_left_open: int  # requests that the server still held when all clients were gone
    kv_cache_usage: float  # of the idle server
    num_pairs: int  # of requests whose order is certain
    num_overtaken: int  # pairs that were answered in the wrong order
    longest_look_s: float  # at the queue
    memory_mib: tuple[float, ...]  # of all processes, median of each part of the run

    @property
    def memory_growth(self) -> float:
        """From the second part to the last; the first warms up."""
        return self.memory_mib[-1] / self.memory_mib[1] - 1

    @property
    def complaints(self) -> list[str]:
        """Why the server did not pass; empty when it did."""
        found = [f"{count} x {kind}" for kind, count in self.failures.items()]
        if not self.ended.get(Manner.READ):
            found.append("no request was read to its end")
        if self.num_left_open:
            found.append(f"{self.num_left_open} requests still open after {IDLE_LIMIT_S:g} s")
        if self.kv_cache_usage > 0:
            found.append(f"{self.kv_cache_usage:.2%} of the KV cache in use by an idle server")
        if not self.num_pairs:
            found.append("no two requests waited together, so their order is not known")
        if self.num_overtaken:
            found.append(f"{self.num_overtaken} of {self.num_pairs} pairs in the wrong order")
        if self.memory_growth > MAX_GROWTH:
            found.append(f"memory grew by {self.memory_growth:.1%}; at most {MAX_GROWTH:.0%}")
        return found


class Clients:
    """Clients that send one request after another until they are stopped."""

    def __init__(self, base_url: str, tally: Tally) -> None:
        self._tally = tally
        self._http = httpx.AsyncClient(
            base_url=base_url,
            timeout=REQUEST_LIMIT_S,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    async def run(self, num_clients: int, duration_s: float) -> None:
        async with self._http:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(duration_s), asyncio.TaskGroup() as group:
                    for index in range(num_clients):
                        group.create_task(self._run_one(random.Random(index)))

    async def _run_one(self, rng: random.Random) -> None:
        while True:
            (manner,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
            try:
                if await self._is_refused(manner, rng):
                    await asyncio.sleep(rng.uniform(0, MAX_PAUSE_S))
            except (httpx.HTTPError, TimeoutError) as error:
                self._tally.failures[f"{manner}: {type(error).__name__}"] += 1

    async def _is_refused(self, manner: Manner, rng: random.Random) -> bool:
        """Send one request and see to its reply; True when the server would not take it."""
        body = {
            "input": rng.choice(TEXTS),
            "response_format": "pcm",
            "seed": rng.randrange(2**32),
            "max_tokens": rng.randint(20, 80),
            "priority": URGENT if rng.random() < 0.1 else 0,
            "request_id": f"soak-{rng.randrange(2**64)}",
        }
        if manner is Manner.CANCEL:
            return await self._send_and_cancel(body, rng)
        if manner is not Manner.LEAVE_EARLY:
            return await self._send(body, manner, rng)
        try:
            async with asyncio.timeout(rng.uniform(0, 1)):
                return await self._send(body, manner, rng)
        except TimeoutError:
            self._tally.ended[manner] += 1
            return False

    async def _send_and_cancel(self, body: dict[str, Any], rng: random.Random) -> bool:
        """Have the request cancelled at some time; it may be queued, running or over by then."""

        async def cancel() -> None:
            await asyncio.sleep(rng.uniform(0, MAX_CANCEL_S))
            reply = await self._http.post("/cancel", json={"request_id": body["request_id"]})
            if reply.status_code not in (httpx.codes.OK, httpx.codes.NOT_FOUND):
                self._tally.failures[f"POST /cancel: status {reply.status_code}"] += 1

        cancelling = asyncio.create_task(cancel())
        try:
            return await self._send(body, Manner.CANCEL, rng)
        except httpx.RemoteProtocolError:  # how a reply under way is broken off
            self._tally.ended[Manner.CANCEL] += 1
            return False
        finally:
            cancelling.cancel()
            await asyncio.gather(cancelling, return_exceptions=True)

    async def _send(self, body: dict[str, Any], manner: Manner, rng: random.Random) -> bool:
        sent_at = time.monotonic()
        async with self._http.stream("POST", ENDPOINTS["speech"], json=body) as reply:
            status = reply.status_code
            if status == httpx.codes.OK:
                queued_at = self._tally.queued_at.get(body["request_id"], math.inf)
                turn = Turn(body["priority"], sent_at, queued_at, time.monotonic())
                self._tally.turns.append(turn)
                await self._take(reply, manner, rng)
                return False
        if status in REFUSED:
            self._tally.refused[f"status {status}"] += 1
            return True
        if manner is Manner.CANCEL and status == CANCELLED:
            self._tally.ended[manner] += 1
        else:
            self._tally.failures[f"{manner}: status {status}"] += 1
        return False

    async def _take(self, reply: httpx.Response, manner: Manner, rng: random.Random) -> None:
        num_bytes = 0
        async for chunk in reply.aiter_raw():
            num_bytes += len(chunk)
            if manner is Manner.LEAVE_MIDWAY:
                break
            if manner is Manner.READ_SLOWLY:
                await asyncio.sleep(rng.uniform(0, 0.5))
        whole = num_bytes > 0 and num_bytes % BYTES_PER_FRAME == 0
        if manner in (Manner.READ, Manner.READ_SLOWLY) and not whole:
            self._tally.failures[f"{manner}: {num_bytes} bytes are not whole frames"] += 1
        else:
            self._tally.ended[manner] += 1


@contextlib.contextmanager
def small_server(*flags: str) -> Iterator[tuple[str, psutil.Process]]:
    """A ready server on the small random model, started with these flags, and its process."""
    program = [sys.executable, "-m", "vllm.entrypoints.cli", "serve", "--host", "127.0.0.1"]
    program += ["--model", RANDOM_MODEL_NAME]  # which makes audio of any length
    quiet = ["--disable-uvicorn-access-log", "--port", "0"]
    with tempfile.NamedTemporaryFile("w") as log:
        process = subprocess.Popen([*program, *quiet, *flags], stderr=log, stdout=log)
        try:
            yield _url_when_ready(Path(log.name), process), psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(STOP_LIMIT_S)


def _url_when_ready(log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"listening on \S+:(\d+)", log.read_text(encoding="utf-8"))
        if found:
            url = f"http://127.0.0.1:{found[1]}"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", trust_env=False).status_code == httpx.codes.OK:
                    return url
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{log.read_text(encoding='utf-8')}")


async def soak(
    url: str, process: psutil.Process, *, num_clients: int, duration_s: float, show_progress: bool
) -> Outcome:
    """Let the clients at the server, then look at what they left behind."""
    tally = Tally()
    watching = asyncio.gather(
        _watch(process, tally, duration_s, show_progress), _look_at_queue(url, tally)
    )
    await Clients(url, tally).run(num_clients, duration_s)
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    num_left_open, kv_cache_usage = await _idle_state(url)
    num_pairs, num_overtaken = count_overtaken(tally.turns, ORDER_GAP_S + tally.longest_look_s)
    return Outcome(
        duration_s=duration_s,
        ended=dict(tally.ended),
        refused=dict(tally.refused),
        failures=dict(tally.failures),
        num_left_open=num_left_open,
        kv_cache_usage=kv_cache_usage,
        num_pairs=num_pairs,
        num_overtaken=num_overtaken,
        longest_look_s=tally.longest_look_s,
        memory_mib=_medians(tally.memory, duration_s),
    )


async def _watch(
    process: psutil.Process, tally: Tally, duration_s: float, show_progress: bool
) -> None:
    start = time.monotonic()
    with tqdm(total=round(duration_s), unit="s", disable=not show_progress) as bar:
        while True:
            family = [process, *process.children(recursive=True)]
            tally.memory.append(
                (time.monotonic() - start, sum(member.memory_info().rss for member in family))
            )
            failures = sum(tally.failures.values())
            bar.set_postfix(ended=sum(tally.ended.values()), failures=failures)
            await asyncio.sleep(1)
            bar.update()


async def _look_at_queue(url: str, tally: Tally) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_LIMIT_S, trust_env=False) as http:
        while True:
            start = time.monotonic()
            queue = (await http.get("/queue")).json()
            end = time.monotonic()
            for request_id in queue["pending_requests"]:
                tally.queued_at.setdefault(request_id, end)
            tally.longest_look_s = max(tally.longest_look_s, end - start)
            await asyncio.sleep(LOOK_EVERY_S)


async def _idle_state(url: str) -> tuple[int, float]:
    """Open requests and share of the KV cache in use, once the server has had time to clear up."""
    deadline = time.monotonic() + IDLE_LIMIT_S
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_LIMIT_S, trust_env=False) as http:
        while True:
            gauges = _gauges((await http.get("/metrics")).text)
            num_open = round(sum(gauges[name] for name in OPEN_GAUGES))
            usage = gauges["vllm:gpu_cache_usage_perc"]
            if (not num_open and not usage) or time.monotonic() > deadline:
                return num_open, usage
            await asyncio.sleep(0.2)


def _gauges(page: str) -> dict[str, float]:
    families = text_string_to_metric_families(page)
    return {family.name: family.samples[0].value for family in families if family.type == "gauge"}


def _medians(memory: Sequence[tuple[float, int]], duration_s: float) -> tuple[float, ...]:
    """MiB in each part of a run."""
    parts: list[list[int]] = [[] for _ in range(NUM_PARTS)]
    for at, num_bytes in memory:
        parts[min(NUM_PARTS - 1, int(at / duration_s * NUM_PARTS))].append(num_bytes)
    return tuple(median(part) / 2**20 for part in parts if part)


def run(*, num_clients: int, duration_s: float, show_progress: bool = True) -> Outcome:
    """Start a server, soak it, stop it."""
    with small_server(*SERVER_FLAGS) as (url, process):
        return asyncio.run(
            soak(
                url,
                process,
                num_clients=num_clients,
                duration_s=duration_s,
                show_progress=show_progress,
            )
        )


def print_outcome(outcome: Outcome) -> None:
    rows: list[list[object]] = []
    for title in ("ended", "refused", "failures"):
        counts = getattr(outcome, title)
        rows += [[f"{title}: {name}", count] for name, count in sorted(counts.items())]
    rows.append(["requests still open", outcome.num_left_open])
    rows.append(["share of the KV cache in use", outcome.kv_cache_usage])
    rows.append(["pairs whose order is certain", outcome.num_pairs])
    rows.append(["pairs in the wrong order", outcome.num_overtaken])
    rows.append(["longest look at the queue, s", f"{outcome.longest_look_s:.2f}"])
    rows.append(["memory at first, MiB", outcome.memory_mib[0]])
    rows.append(["memory after a tenth, MiB", outcome.memory_mib[1]])
    rows.append(["memory at the end, MiB", outcome.memory_mib[-1]])
    rows.append(["memory growth after a tenth", f"{outcome.memory_growth:+.2%}"])
    print(format_table(["", f"{outcome.duration_s:g} s"], rows))
    print("passed" if not outcome.complaints else "failed: " + "; ".join(outcome.complaints))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.minutes <= 0 or arguments.clients < 1:
        parser.error("--minutes and --clients must be more than 0")
    outcome = run(num_clients=arguments.clients, duration_s=60 * arguments.minutes)
    print_outcome(outcome)
    if arguments.json is not None:
        results: dict[str, Any] = asdict(outcome) | {"complaints": outcome.complaints}
        write_json(arguments.json, {"clients": arguments.clients, **results})
    return int(bool(outcome.complaints))


if __name__ == "__main__":
    sys.exit(main())
