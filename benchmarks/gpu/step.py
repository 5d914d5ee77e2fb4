"""Section ``step``: whole decode steps of the engine's runner, sampling and results included."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from benchmarks.gpu import floors
from benchmarks.gpu.random_engine import FP8_OPTIONS, open_core, runner_of
from benchmarks.gpu.steps import Rows, fill_pages
from benchmarks.gpu.suite import Suite
from vllm.exceptions import ConfigError

__all__ = ["kv_memory", "run"]

_VOICE = 300  # positions, for rows that share a voice
# Milliseconds at 800 positions that were predicted before anything was measured: five fused kernels
# per layer in one graph, with dependent launches (design notes of 2026-11).
_PREDICTED_MS = {1: 1.63, 8: 1.78, 32: 2.39, 64: 3.19, 128: 4.79, 256: 9.2}


def run(suite: Suite) -> None:
    """All batches and contexts as the engine runs by default, then what makes it what it is."""
    item = suite.scale.dtype.itemsize
    batches, contexts = suite.scale.step_batches, suite.scale.contexts
    _measure(suite, "", {}, [*itertools.product(batches, contexts)], (item, item))
    some = [(b, contexts[len(contexts) // 2]) for b in (batches[0], batches[len(batches) // 2])]
    for ablation, (suffix, options, itemsizes) in _ablations(item).items():
        if ablation in suite.ablations:
            _measure(suite, suffix, options, some, itemsizes)
    _cost_of_invariance(suite, some)


def _ablations(item: int) -> dict[str, tuple[str, dict[str, Any], tuple[float, float]]]:
    """Name -> suffix of figures, options of the engine, bytes of a weight and of a key's number."""
    return {
        "eager": (" eager", {"enforce_eager": True}, (item, item)),
        "not-invariant": (" not invariant", {"batch_invariant": False}, (item, item)),
        "dependent-launch": (" dependent launch", {"dependent_launch": "on"}, (item, item)),
        "prefetch": (" weights fetched ahead", {"dependent_launch": "prefetch"}, (item, item)),
        "fp8-weights": (" fp8 weights", {"quantization": "fp8"}, (1, item)),
        "fp8": (" fp8", FP8_OPTIONS, (1, 1)),
    }


def kv_memory(suite: Suite) -> int:
    """Bytes of a cache in which the largest case has room."""
    positions = max(suite.scale.contexts) + suite.scale.num_steps + 64
    rows = max(suite.scale.step_batches)
    per_position = floors.kv_bytes_per_position(suite.config, suite.scale.dtype.itemsize)
    return int(rows * positions * per_position)


def _measure(
    suite: Suite,
    suffix: str,
    options: dict[str, Any],
    cases: list[tuple[int, int]],
    itemsizes: tuple[float, float],
) -> None:
    """One engine, with all cases over it."""
    if suite.is_over:
        suite.note(f"no time left for the engine{suffix}")
        return
    with suite.attempt(f"engine{suffix}"):
        try:
            _with_engine(suite, suffix, options, cases, itemsizes)
        except ConfigError as error:
            suite.note(f"not there:{suffix or ' default'} ({error})")


def _with_engine(
    suite: Suite,
    suffix: str,
    options: dict[str, Any],
    cases: list[tuple[int, int]],
    itemsizes: tuple[float, float],
) -> None:
    most = max(batch for batch, _ in cases)
    with open_core(
        suite, decodes_audio=False, max_num_seqs=most, kv_cache_memory=kv_memory(suite), **options
    ) as core:
        runner = runner_of(core)
        fill_pages(runner)
        for batch, context in suite.in_time(cases):
            with suite.attempt(f"B={batch} ctx={context}{suffix}"):
                _one_case(suite, core, batch, context, suffix, itemsizes)
        if not suffix:
            with suite.attempt("shared voice"):
                _with_shared_voice(suite, core, *cases[-1])


def _one_case(
    suite: Suite, core: Any, batch: int, context: int, suffix: str, itemsizes: tuple[float, float]
) -> None:
    work = floors.decode_step(
        suite.config, batch, context, weight_itemsize=itemsizes[0], kv_itemsize=itemsizes[1]
    )
    rows = Rows(suite, runner_of(core), core.info.num_kv_blocks)
    allocations = _num_allocations(suite)
    seconds = _step_seconds(suite, rows, batch, context)
    allocated = _num_allocations(suite) - allocations
    note = f"{batch / (seconds * 25):.0f} audio-s/s"
    if suite.is_cuda:
        note += f", {allocated} allocations in all"
    if not suffix and context == 800 and batch in _PREDICTED_MS:
        note += f", predicted {_PREDICTED_MS[batch]} ms"
    name = f"step B={batch} ctx={context}{suffix}"
    suite.add(name, seconds * 1e3, "ms", work=work, note=note)


def _cost_of_invariance(suite: Suite, cases: list[tuple[int, int]]) -> None:
    """What it costs that a row's bits do not depend on the others, where both were measured."""
    for batch, context in cases:
        name = f"step B={batch} ctx={context}"
        with_it, without = (suite.ledger.find(name + each) for each in ("", " not invariant"))
        if with_it and without:
            cost = 100 * (with_it.value / without.value - 1)
            suite.add(f"cost of batch invariance B={batch} ctx={context}", cost, "%")


def _with_shared_voice(suite: Suite, core: Any, batch: int, context: int) -> None:
    """The same step where all rows read the pages of one voice; the floor is that of own pages."""
    num_shared = min(_VOICE, context // 2)
    rows = Rows(suite, runner_of(core), core.info.num_kv_blocks, num_shared=num_shared)
    seconds = _step_seconds(suite, rows, batch, context)
    item = suite.scale.dtype.itemsize
    work = floors.decode_step(suite.config, batch, context, weight_itemsize=item, kv_itemsize=item)
    name = f"step B={batch} ctx={context}, {num_shared} positions shared"
    suite.add(name, seconds * 1e3, "ms", work=work)


def _step_seconds(suite: Suite, rows: Rows, batch: int, context: int) -> float:
    """Seconds of a step whose contexts have ``context`` positions on average."""
    num_steps = suite.scale.num_steps
    first = max(context - num_steps // 2, 1)
    rows.open(batch, first, num_steps + 32)
    try:
        return rows.decode(num_steps)
    finally:
        rows.close()


def _num_allocations(suite: Suite) -> int:
    if not suite.is_cuda:
        return 0
    return int(torch.cuda.memory_stats(suite.device).get("allocation.all.allocated", 0))
