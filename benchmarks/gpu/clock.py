"""Times work on a device: the kernels themselves, without what it takes to launch them.

Knows nothing of what is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

__all__ = ["seconds_per_call", "synchronize"]

Call = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(
    calls: Sequence[Call], device: torch.device, *, num_rounds: int, captured: bool = True
) -> float:
    """Median seconds of one call when all are made one after another, over some rounds.

    On CUDA the calls are one graph, as they are in a decode step, unless ``captured`` is False.
    Calls with memory of their own, more than a cache holds, find none of it there.
    """
    run = _as_one(calls)
    if device.type != "cuda":
        run()
        return median(_seconds_of(run) for _ in range(num_rounds)) / len(calls)
    play = _capture(run) if captured else run
    play()
    events = [(_event(), _event()) for _ in range(num_rounds)]
    for start, stop in events:
        start.record()
        play()
        stop.record()
    torch.cuda.synchronize(device)
    return median(start.elapsed_time(stop) for start, stop in events) * 1e-3 / len(calls)


def _as_one(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _capture(run: Call) -> Call:
    """The calls as a CUDA graph; made twice before, so that nothing is compiled while recording."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"  timed with its launches, since no graph can hold it: {error}", flush=True)
        return run
    return graph.replay


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _seconds_of(run: Call) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
