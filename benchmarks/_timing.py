"""Times rivals in one run, taking turns, so that a noisy machine is noisy to all of them.

Knows nothing of what the rivals do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from tqdm import tqdm

__all__ = ["CLOCKS", "interleave", "ratio"]

# thread: CPU time of one thread, on a machine that others use
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}


def interleave(
    rivals: Mapping[str, Callable[[], object]],
    *,
    num_rounds: int,
    title: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each rival in each round; one round before the first does not count.

    The order turns round from round to round, so that none always runs on the other's caches.
    ``clock`` may count a thread's CPU time instead of that on the wall.
    """
    names = list(rivals)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_idx in tqdm(range(-1, num_rounds), desc=title, unit="round"):
        for name in names if round_idx % 2 == 0 else reversed(names):
            start = clock()
            rivals[name]()
            elapsed = clock() - start
            if round_idx >= 0:
                seconds[name].append(elapsed)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios of the rounds; drift of the machine cancels out within a round."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))
