"""Load on a running speech server, point after point: first audio, throughput, underruns, failures.

What is sent and measured is in ``vllm.benchmarks``; here are the points, their table and picture.
Closed loop: a fixed number of clients. Open loop: requests at random times (Poisson).

    python -m benchmarks.serve_speech --concurrency 1 4 16 --num-requests 64
    python -m benchmarks.serve_speech --rate 0.5 1 2 --num-requests 100 --json out.json --plot out.png
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from benchmarks._report import circumstances, format_table, write_json
from vllm import envs
from vllm.benchmarks import PERCENTILES, Load, run_load
from vllm.benchmarks.client import Client, Settings, make_bodies


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


async def run(
    loads: Sequence[Load], settings: Settings, *, num_requests: int, num_warmups: int
) -> dict[str, Any]:
    """All load points, one after another, on one client."""
    async with Client(settings) as client:
        await client.check()
        for body in make_bodies(settings, num_warmups):
            await client.speak(body)
        bodies = make_bodies(settings, num_requests)
        points = [await run_load(load, bodies, client.speak, seed=settings.seed) for load in loads]
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
        api_key=envs.VLLM_API_KEY,  # no flag: the command is written to the JSON
        max_tokens=tuple(arguments.max_tokens) if arguments.max_tokens else None,
        timeout_s=arguments.timeout_s,
        seed=arguments.seed,
    )
    if arguments.rate:
        loads = [Load(rate=rate) for rate in arguments.rate]
    else:
        numbers = arguments.concurrency or [1]
        loads = [Load(concurrency=number) for number in numbers]
    try:
        results = asyncio.run(
            run(
                loads,
                settings,
                num_requests=arguments.num_requests,
                num_warmups=arguments.num_warmups,
            )
        )
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
