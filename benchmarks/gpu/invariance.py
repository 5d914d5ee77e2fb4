"""Section ``invariance``: requests in changing company, against the same requests alone."""

from __future__ import annotations

import gc
from typing import Any

import torch

from benchmarks.gpu.random_engine import make_core
from benchmarks.gpu.suite import Suite
from benchmarks.invariance import check_invariance
from vllm.v1.engine.core import EngineCore

__all__ = ["run"]

_SOLO_BYTES = 2 << 30  # of the cache of the engine for single requests


def run(suite: Suite) -> None:
    """``benchmarks.invariance`` on the suite's model: arrivals, cancellations, scarce pages."""

    def make(**options: Any) -> EngineCore:
        gc.collect()
        if suite.is_cuda:
            torch.cuda.empty_cache()
        return make_core(suite, decodes_audio=True, **{"kv_cache_memory": _SOLO_BYTES} | options)

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
