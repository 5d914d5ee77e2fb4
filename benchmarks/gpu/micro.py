"""Section ``micro``: kernels one by one, ours beside torch's, as shares of reading and computing."""

from __future__ import annotations

import itertools

from benchmarks.gpu import kernel_cases, linear_cases
from benchmarks.gpu.clock import seconds_per_call
from benchmarks.gpu.floors import Work
from benchmarks.gpu.kernel_cases import Case, SamplerRows
from benchmarks.gpu.suite import Suite

__all__ = ["run"]


def run(suite: Suite) -> None:
    """Products by rows, attention by batch and context, embedding and sampler by rows."""
    scale = suite.scale
    for rows in suite.in_time(scale.micro_rows):
        for case in linear_cases.linear_cases(suite, rows, is_cold=True):
            _measure(suite, case)
        _measure(suite, linear_cases.embed_case(suite, rows))
    for rows in suite.in_time(scale.sampler_rows):
        for case in linear_cases.linear_cases(suite, rows, is_cold=True, is_fp8=True):
            _measure(suite, case)
    for batch, context in suite.in_time(itertools.product(scale.attention_batches, scale.contexts)):
        _measure(suite, kernel_cases.attention_case(suite, batch, context, is_cold=True))
    if suite.uses_triton:
        for rows in suite.in_time(scale.sampler_rows):
            _measure_sampler(suite, rows)


def _measure(suite: Suite, case: Case) -> None:
    name, rounds = f"{case.kernel} {case.shape}", suite.scale.num_rounds
    with suite.attempt(name):
        ours = seconds_per_call(case.ours, suite.device, num_rounds=rounds)
        theirs = seconds_per_call(case.torch, suite.device, num_rounds=rounds)
        _add(suite, name, ours, theirs, case.work)


def _measure_sampler(suite: Suite, rows: int) -> None:
    name, device = f"sampler rows={rows}", suite.device
    with suite.attempt(name):
        streams = SamplerRows(suite, rows)
        rounds = suite.scale.num_rounds if suite.is_cuda else 1  # the interpreter takes a second
        ours = seconds_per_call([streams.draw], device, num_rounds=rounds)
        # torch's waits for nothing, but is many launches: as it is, not as a graph would have it.
        theirs = seconds_per_call([streams.torch_draw], device, num_rounds=rounds, captured=False)
        _add(suite, name, ours, theirs, streams.work)


def _add(suite: Suite, name: str, ours: float, theirs: float, work: Work) -> None:
    read_share = work.num_bytes / ours / suite.ceilings.read_bytes_s
    note = f"{100 * read_share:.0f} % of reading, {work.operations / ours / 1e12:.3g} Top/s"
    suite.add(name, ours * 1e6, "us", work=work, note=f"{note}; torch {theirs * 1e6:.1f} us")
