"""``--profile``: share of a decode step's time by kernel, for few rows and for many."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from benchmarks._report import format_table
from benchmarks.gpu.random_engine import open_core, runner_of
from benchmarks.gpu.step import kv_memory
from benchmarks.gpu.steps import Rows, fill_pages
from benchmarks.gpu.suite import Suite

__all__ = ["run"]

_NUM_STEPS = 20
_NUM_SHOWN = 20


def run(suite: Suite) -> None:
    """Profile steady steps of the smallest batch and of 64; tables go to the JSON too."""
    scale = suite.scale
    batches = (1, 64) if suite.is_cuda else scale.step_batches[:1]
    context = scale.contexts[len(scale.contexts) // 2]
    tables = {}
    with open_core(
        suite, decodes_audio=False, max_num_seqs=max(batches), kv_cache_memory=kv_memory(suite)
    ) as core:
        runner = runner_of(core)
        fill_pages(runner)
        for batch in batches:
            rows = Rows(suite, runner, core.info.num_kv_blocks)
            rows.open(batch, context, scale.num_steps + _NUM_STEPS + 64)
            seconds = rows.decode(scale.num_steps)
            tables[f"B={batch}"] = _kernels(suite, rows)
            rows.close()
            _show(suite, batch, seconds, tables[f"B={batch}"])
    suite.extras["profile"] = tables


def _kernels(suite: Suite, rows: Rows) -> list[dict[str, float | str]]:
    """Microseconds a step and launches a step of each kernel, the largest first."""
    activities = [ProfilerActivity.CUDA] if suite.is_cuda else [ProfilerActivity.CPU]
    num_steps = _NUM_STEPS if suite.is_cuda else 2
    with profile(activities=activities) as profiler:
        rows.decode(num_steps)
    wanted = "self_device_time_total" if suite.is_cuda else "self_cpu_time_total"
    averages = profiler.key_averages()
    # What warms up before the timed steps is profiled too.
    total_steps = num_steps + Rows.NUM_WARM_STEPS
    found = [
        {
            "kernel": event.key,
            "us": getattr(event, wanted) / total_steps,
            "launches": event.count / total_steps,
        }
        for event in averages
        if getattr(event, wanted) > 0
    ]
    return sorted(found, key=lambda each: -each["us"])


def _show(suite: Suite, batch: int, seconds: float, kernels: list[dict[str, float | str]]) -> None:
    busy_us = sum(float(each["us"]) for each in kernels)
    if not busy_us:
        suite.note(f"B={batch}: the profiler saw no kernel")
        return
    share = busy_us / (seconds * 1e6)
    suite.add(f"device busy in a step of B={batch}", 100 * share, "%")
    table = [
        [str(each["kernel"])[:70], each["us"], 100 * float(each["us"]) / busy_us, each["launches"]]
        for each in kernels[:_NUM_SHOWN]
    ]
    print(f"B={batch}: {seconds * 1e3:.3f} ms a step on the wall, {busy_us / 1e3:.3f} in kernels")
    print(format_table(["kernel", "us a step", "%", "launches a step"], table), flush=True)
