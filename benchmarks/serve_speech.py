"""Load on a running speech server: time to first audio, throughput, underruns, failures.

Speaks HTTP only and knows nothing of the engine. Closed loop: a fixed number of clients, each sends
its next request when the last one is done. Open loop: requests arrive at random (Poisson) whatever
the server does, so that queues can build up as they do in life.

    python -m benchmarks.serve_speech --concurrency 1 4 16 --num-requests 64
    python -m benchmarks.serve_speech --rate 0.5 1 2 --num-requests 100 --json out.json --plot out.png
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from benchmarks._report import circumstances, format_table, percentiles, write_json

PERCENTILES = (50, 90, 95, 99)
TEXTS = (
    "Good morning.",
    "The train to the coast leaves from platform four in ten minutes.",
    "Please leave a message after the tone, and we will call you back as soon as we can.",
    "Nobody had expected the river to rise so quickly, yet by noon the lower meadows were under "
    "water and the farmers were moving their sheep.",
)


@dataclass(frozen=True)
class Settings:
    """What is sent, and where to."""

    base_url: str
    voice: str | None = None
    model: str | None = None
    api_key: str | None = None
    max_tokens: tuple[int, int] | None = None  # frames of one request, drawn uniformly
    timeout_s: float = 120.0
    seed: int = 0


@dataclass
class Result:
    """One request, with times in seconds from the moment it was due."""

    started_at: float
    arrivals: list[tuple[float, float]] = field(default_factory=list)  # (time, audio seconds)
    finished_s: float = 0.0
    failure: str | None = None

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


@dataclass(frozen=True)
class Load:
    """One load point: ``concurrency`` clients, or ``rate`` requests per second."""

    num_requests: int
    concurrency: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        return f"{self.concurrency} clients" if self.rate is None else f"{self.rate:g}/s"


def play(arrivals: Sequence[tuple[float, float]]) -> Playback:
    """Play chunks ``(arrival time, audio seconds)`` as they come; a gap stops the player."""
    num_underruns, stalled_s = 0, 0.0
    buffered_until = arrivals[0][0] if arrivals else 0.0
    for arrived_at, seconds in arrivals:
        if arrived_at > buffered_until:
            num_underruns += 1
            stalled_s += arrived_at - buffered_until
            buffered_until = arrived_at
        buffered_until += seconds
    return Playback(num_underruns, stalled_s)


def summarize(results: Sequence[Result], wall_s: float) -> dict[str, Any]:
    """Figures of one load point; a failed request counts as a failure and nowhere else."""
    good = [result for result in results if result.failure is None]
    playbacks = [play(result.arrivals) for result in good]
    first_audio = [result.first_audio_s for result in good if result.first_audio_s is not None]
    return {
        "num_requests": len(results),
        "num_failures": len(results) - len(good),
        "failures": dict(Counter(r.failure for r in results if r.failure is not None)),
        "wall_s": wall_s,
        "time_to_first_audio_s": percentiles(first_audio, PERCENTILES),
        "latency_s": percentiles([result.finished_s for result in good], PERCENTILES),
        "rtf": percentiles([result.rtf for result in good], PERCENTILES),
        "audio_s": sum(result.audio_s for result in good),
        "audio_s_per_s": sum(result.audio_s for result in good) / wall_s,
        "requests_per_s": len(good) / wall_s,
        "num_underruns": sum(playback.num_underruns for playback in playbacks),
        "num_requests_with_underruns": sum(playback.num_underruns > 0 for playback in playbacks),
        "stalled_s": sum(playback.stalled_s for playback in playbacks),
    }


class Client:
    """Sends speech requests and times what comes back."""

    def __init__(self, settings: Settings, transport: httpx.AsyncBaseTransport | None = None):
        self._settings = settings
        headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        self._http = httpx.AsyncClient(
            base_url=settings.base_url,
            headers=headers,
            timeout=settings.timeout_s,
            limits=httpx.Limits(max_connections=None),
            transport=transport,
            trust_env=False,
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def check(self) -> None:
        """Raise when the server cannot be used."""
        (await self._http.get("/health")).raise_for_status()

    async def speak(self, body: dict[str, Any]) -> Result:
        """One streamed request; whatever goes wrong is noted in the result."""
        result = Result(started_at=time.perf_counter())
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._stream(body, result)
        except (httpx.HTTPError, TimeoutError) as error:
            result.failure = type(error).__name__
        result.finished_s = time.perf_counter() - result.started_at
        return result

    async def _stream(self, body: dict[str, Any], result: Result) -> None:
        async with self._http.stream("POST", "/v1/audio/speech", json=body) as reply:
            if reply.status_code != httpx.codes.OK:
                result.failure = f"status {reply.status_code}"
                return
            bytes_per_s = int(reply.headers["X-Sample-Rate"]) * 2  # 16-bit mono
            async for chunk in reply.aiter_raw():
                now = time.perf_counter() - result.started_at
                result.arrivals.append((now, len(chunk) / bytes_per_s))
        if not result.arrivals:
            result.failure = "no audio"


def make_bodies(settings: Settings, count: int) -> list[dict[str, Any]]:
    """Request bodies, the same ones for the same seed."""
    rng = random.Random(settings.seed)
    bodies = []
    for index in range(count):
        body: dict[str, Any] = {
            "input": TEXTS[index % len(TEXTS)],
            "response_format": "pcm",
            "seed": rng.randrange(2**32),
        }
        if settings.voice is not None:
            body["voice"] = settings.voice
        if settings.model is not None:
            body["model"] = settings.model
        if settings.max_tokens is not None:
            body["max_tokens"] = rng.randint(*settings.max_tokens)
        bodies.append(body)
    return bodies


async def run_load(
    load: Load, settings: Settings, client: Client, *, show_progress: bool = True
) -> dict[str, Any]:
    """Send the requests of one load point and summarize them."""
    bodies = make_bodies(settings, load.num_requests)
    with tqdm(total=len(bodies), desc=load.name, unit="request", disable=not show_progress) as bar:

        async def speak(body: dict[str, Any]) -> Result:
            result = await client.speak(body)
            bar.update()
            return result

        start = time.perf_counter()
        if load.rate is None:
            assert load.concurrency is not None
            results = await _closed_loop(bodies, load.concurrency, speak)
        else:
            rng = random.Random(settings.seed + 1)
            results = await _open_loop(bodies, load.rate, rng, speak)
        wall_s = time.perf_counter() - start
    return {"load": asdict(load) | {"name": load.name}, **summarize(results, wall_s)}


Speak = Callable[[dict[str, Any]], Awaitable[Result]]


async def _closed_loop(
    bodies: Sequence[dict[str, Any]], concurrency: int, speak: Speak
) -> list[Result]:
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
    bodies: Sequence[dict[str, Any]], rate: float, rng: random.Random, speak: Speak
) -> list[Result]:
    due = time.perf_counter()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for body in bodies:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(group.create_task(_speak(speak, body)))
            due += rng.expovariate(rate)
    return [task.result() for task in tasks]


async def _speak(speak: Speak, body: dict[str, Any]) -> Result:
    return await speak(body)


def print_points(points: Sequence[dict[str, Any]]) -> None:
    header = ["load", "requests", "failed"]
    header += [f"first audio P{point} ms" for point in PERCENTILES]
    header += ["RTF P50", "RTF P90", "audio s/s", "requests/s", "underruns", "stalled s"]
    rows = []
    for point in points:
        first, rtf = point["time_to_first_audio_s"], point["rtf"]
        row: list[object] = [point["load"]["name"], point["num_requests"], point["num_failures"]]
        row += [first[f"p{p}"] * 1000 if first else None for p in PERCENTILES]
        row += [rtf.get("p50"), rtf.get("p90"), point["audio_s_per_s"], point["requests_per_s"]]
        row += [point["num_underruns"], point["stalled_s"]]
        rows.append(row)
    print(format_table(header, rows))
    for point in points:
        for failure, count in point["failures"].items():
            print(f"{point['load']['name']}: {count} x {failure}")


def plot(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Time to first audio and throughput over the load, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [point["load"]["name"] for point in points]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for p in PERCENTILES:
        values = [1000 * point["time_to_first_audio_s"].get(f"p{p}", 0.0) for point in points]
        left.plot(names, values, marker="o", label=f"P{p}")
    left.set(title="Time to first audio", ylabel="ms", xlabel="load", ylim=(0, None))
    left.legend()
    right.bar(names, [point["audio_s_per_s"] for point in points])
    right.set(title="Throughput", ylabel="audio seconds per second", xlabel="load")
    facts = circumstances()
    figure.suptitle(f"{facts['machine']} · {facts['commit']} · {facts['date']}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


async def run(loads: Sequence[Load], settings: Settings, *, num_warmups: int) -> dict[str, Any]:
    """All load points, one after another, on one client."""
    async with Client(settings) as client:
        await client.check()
        for body in make_bodies(settings, num_warmups):
            await client.speak(body)
        points = [await run_load(load, settings, client) for load in loads]
    return {"settings": asdict(settings) | {"api_key": None}, "points": points}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8778")
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument(
        "--concurrency", type=int, nargs="+", metavar="N", help="closed loop; default 1"
    )
    loop.add_argument(
        "--rate", type=float, nargs="+", metavar="R", help="open loop: requests per second"
    )
    parser.add_argument("--num-requests", type=int, default=32, help="per load point")
    parser.add_argument("--num-warmups", type=int, default=1, help="requests that do not count")
    parser.add_argument("--voice")
    parser.add_argument("--model")
    parser.add_argument("--api-key")
    parser.add_argument(
        "--max-tokens",
        type=int,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="frames of a request, drawn uniformly; default: the model decides",
    )
    parser.add_argument("--timeout-s", type=float, default=120.0, help="of one request")
    parser.add_argument("--seed", type=int, default=0, help="of texts, lengths and arrivals")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG")
    arguments = parser.parse_args(argv)
    loads = [*(arguments.concurrency or ()), *(arguments.rate or ())]
    if any(load <= 0 for load in loads) or arguments.num_requests < 1:
        parser.error("--concurrency, --rate and --num-requests must be more than 0")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    settings = Settings(
        base_url=arguments.base_url,
        voice=arguments.voice,
        model=arguments.model,
        api_key=arguments.api_key,
        max_tokens=tuple(arguments.max_tokens) if arguments.max_tokens else None,
        timeout_s=arguments.timeout_s,
        seed=arguments.seed,
    )
    if arguments.rate:
        loads = [Load(arguments.num_requests, rate=rate) for rate in arguments.rate]
    else:
        numbers = arguments.concurrency or [1]
        loads = [Load(arguments.num_requests, concurrency=number) for number in numbers]
    try:
        results = asyncio.run(run(loads, settings, num_warmups=arguments.num_warmups))
    except httpx.HTTPError as error:
        print(f"{settings.base_url} does not serve: {error!r}", file=sys.stderr)
        return 1
    print_points(results["points"])
    if arguments.json:
        write_json(arguments.json, results)
    if arguments.plot:
        plot(results["points"], arguments.plot)
    return int(any(point["num_failures"] for point in results["points"]))


if __name__ == "__main__":
    sys.exit(main())
