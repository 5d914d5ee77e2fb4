"""Section ``prefill``: prompts into the cache, cold and behind a voice that is there already.

Steps as they are served, recorded where a size holds them, and the same launched one by one.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.gpu import floors
from benchmarks.gpu.random_engine import open_core, runner_of
from benchmarks.gpu.steps import Rows, fill_pages
from benchmarks.gpu.suite import Suite

__all__ = ["run"]

_COALESCED = 8  # prompts


def run(suite: Suite) -> None:
    """Lengths as text and as half voice, then what cached voices leave to do."""
    with suite.attempt("recorded"):
        _run(suite, "prefill")
    if "eager" in suite.ablations:
        with suite.attempt("without graphs"):
            _run(suite, "prefill without graphs,", enforce_eager=True)


def _run(suite: Suite, prefix: str, **options: Any) -> None:
    scale = suite.scale
    longest = max(*scale.prefill_lengths, sum(scale.cached))
    positions = _COALESCED * (longest + 64)
    per_position = floors.kv_bytes_per_position(suite.config, scale.dtype.itemsize)
    with open_core(
        suite,
        decodes_audio=False,
        max_num_seqs=_COALESCED,
        kv_cache_memory=int(max(positions, 2 * scale.max_model_len) * per_position),
        **options,
    ) as core:
        fill_pages(runner_of(core))
        for length in suite.in_time(scale.prefill_lengths):
            _measure(suite, core, f"{prefix} {length} of text", 1, 0, length, 0)
            _measure(suite, core, f"{prefix} {length}, half voice", 1, 0, length, length // 2)
        voice, text = scale.cached
        for count in suite.in_time((1, _COALESCED)):
            name = f"{prefix} {count} x {text} behind {voice} cached"
            _measure(suite, core, name, count, voice, text, 0)


def _measure(
    suite: Suite, core: Any, name: str, count: int, cached: int, length: int, num_audio: int
) -> None:
    rows = Rows(suite, runner_of(core), core.info.num_kv_blocks)
    seconds = []
    for _ in range(2 + max(suite.scale.num_rounds // 2, 1)):
        rows.open(count, cached, length, num_audio=num_audio)
        seconds.append(rows.prefill(cached, length))
        rows.close()
    item = suite.scale.dtype.itemsize
    one = floors.prefill(
        suite.config,
        length - num_audio,
        num_audio,
        num_cached=cached,
        weight_itemsize=item,
        kv_itemsize=item,
    )
    work = floors.Work(one.weight_bytes, count * one.operations, count * one.kv_bytes)
    tokens_s = count * length / median(seconds[2:])
    note = f"{tokens_s:,.0f} positions/s"
    suite.add(name, median(seconds[2:]) * 1e3, "ms", work=work, note=note)
