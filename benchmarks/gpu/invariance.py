"""Section ``invariance``: requests in changing company, against the same requests alone."""

from __future__ import annotations

import gc
from typing import Any

import torch

from benchmarks.gpu.floors import kv_bytes_per_position
from benchmarks.gpu.random_engine import make_core
from benchmarks.gpu.suite import Suite
from benchmarks.invariance import check_invariance
from vllm.v1.engine.core import EngineCore

__all__ = ["run"]

_SOLO_POSITIONS = 8192  # in the cache of the engine for single requests


def run(suite: Suite) -> None:
    """``benchmarks.invariance`` on the suite's model: arrivals, cancellations, scarce pages."""
    per_position = kv_bytes_per_position(suite.config, suite.scale.dtype.itemsize)
    solo_bytes = int(_SOLO_POSITIONS * per_position)

    def make(**options: Any) -> EngineCore:
        gc.collect()
        if suite.is_cuda:
            torch.cuda.empty_cache()
        return make_core(suite, decodes_audio=True, **{"kv_cache_memory": solo_bytes} | options)

    report = check_invariance(
        make,
        num_requests=suite.scale.num_invariance_requests,
        max_num_seqs=min(max(suite.scale.engine_streams), 64),
    )
    note = (
        f"of {report.num_requests}, at most {report.largest_batch} together, "
        f"{report.num_cancelled} cancelled, {report.num_preemptions} swapped out"
    )
    if report.changed:
        note += f": {', '.join(report.changed)}"
    name = "requests that differ from their solo run"
    suite.add(name, len(report.changed), "", note=note, is_wrong=not report.is_invariant)
