"""Measuring speech servers: load, what comes back, figures, reports.

Speaks HTTP only and knows nothing of the engine, so that peers are measured like this server. The
client needs httpx and is therefore imported by its own name: ``vllm.benchmarks.client``.
"""

from __future__ import annotations

from vllm.benchmarks.figures import PERCENTILES, Playback, Result, percentiles, play, summarize
from vllm.benchmarks.load import Load, run_load
from vllm.benchmarks.report import format_report, plot_point, write_results

__all__ = [
    "PERCENTILES",
    "Load",
    "Playback",
    "Result",
    "format_report",
    "percentiles",
    "play",
    "plot_point",
    "run_load",
    "summarize",
    "write_results",
]
