"""How requests reach a server: by a number of clients, at random times, or both.

Knows neither what a request holds nor how it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from tqdm import tqdm

from vllm.benchmarks.figures import Result, summarize

__all__ = ["Load", "run_load"]

_Body: TypeAlias = Mapping[str, Any]
_Speak: TypeAlias = Callable[[_Body], Awaitable[Result]]


@dataclass(frozen=True)
class Load:
    """One load point: ``concurrency`` clients, ``rate`` requests per second, or both.

    Without a rate the loop is closed: each client sends its next request when its last one is done.
    With one it is open: requests arrive at random (Poisson) whatever the server does, so that
    queues can build up as they do in life; a concurrency then caps what is under way.
    """

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        assert self.concurrency is not None or self.rate is not None

    @property
    def name(self) -> str:
        return f"{self.concurrency} clients" if self.rate is None else f"{self.rate:g}/s"


async def run_load(
    load: Load,
    bodies: Sequence[_Body],
    speak: _Speak,
    *,
    seed: int | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Send all bodies and summarize the results; ``seed`` fixes the arrivals of an open loop."""
    with tqdm(total=len(bodies), desc=load.name, unit="request", disable=not show_progress) as bar:

        async def speak_and_show(body: _Body) -> Result:
            result = await speak(body)
            bar.update()
            return result

        start = time.perf_counter()
        if load.rate is None:
            assert load.concurrency is not None
            results = await _closed_loop(bodies, load.concurrency, speak_and_show)
        else:
            rng = random.Random(seed)
            results = await _open_loop(bodies, load.rate, load.concurrency, rng, speak_and_show)
        wall_s = time.perf_counter() - start
    return {"load": asdict(load) | {"name": load.name}, **summarize(results, wall_s)}


async def _closed_loop(bodies: Sequence[_Body], concurrency: int, speak: _Speak) -> list[Result]:
    pending = iter(bodies)
    results: list[Result] = []

    async def run_client() -> None:
        for body in pending:
            results.append(await speak(body))

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(run_client())
    return results


async def _open_loop(
    bodies: Sequence[_Body],
    rate: float,
    concurrency: int | None,
    rng: random.Random,
    speak: _Speak,
) -> list[Result]:
    places = contextlib.nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)

    async def speak_in_place(body: _Body) -> Result:
        async with places:
            return await speak(body)

    due = time.perf_counter()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for body in bodies:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(group.create_task(speak_in_place(body)))
            due += rng.expovariate(rate)
    return [task.result() for task in tasks]
