"""Section ``ceilings``: what the card does at best, which is what all else is held against."""

from __future__ import annotations

import time
from statistics import median

import torch

from benchmarks.gpu.clock import seconds_per_call, synchronize
from benchmarks.gpu.floors import Ceilings
from benchmarks.gpu.suite import Suite

__all__ = ["run"]


def run(suite: Suite) -> None:
    """Bandwidths, products, gaps between kernels, and the way of a result to the host."""
    read_bytes_s = _bandwidths(suite)
    ops_s = _products(suite)
    suite.ceilings = Ceilings(read_bytes_s, ops_s, "measured in this run")
    # What follows bounds nothing.
    with suite.attempt("kernel in a graph"):
        _graph_gap(suite)
    if suite.is_cuda:
        with suite.attempt("product of 8 bits"):
            _eight_bit_product(suite)
        with suite.attempt("way to the host"):
            _way_to_host(suite)


def _bandwidths(suite: Suite) -> float:
    """Copying, and reading alone, which is what decoding does; returns bytes read per second."""
    num_bytes, rounds = suite.scale.ceiling_bytes, suite.scale.num_rounds
    source = torch.ones(num_bytes // 4, device=suite.device)
    target = torch.empty_like(source)
    copy_s = seconds_per_call([lambda: target.copy_(source)], suite.device, num_rounds=rounds)
    suite.add("copy, read + write", 2 * num_bytes / copy_s / 1e9, "GB/s")
    total = torch.empty((), device=suite.device)
    read_s = seconds_per_call(
        [lambda: torch.sum(source, dim=0, out=total)], suite.device, num_rounds=rounds
    )
    suite.add("read, sum of float32", num_bytes / read_s / 1e9, "GB/s")
    return max(num_bytes / read_s, 2 * num_bytes / copy_s)


def _products(suite: Suite) -> float:
    """Square products in the model's type."""
    size, device = suite.scale.matmul_size, suite.device
    x, y = (torch.randn(size, size, device=device).to(suite.scale.dtype) for _ in range(2))
    out = torch.empty_like(x)
    seconds = seconds_per_call([lambda: torch.mm(x, y, out=out)], device, num_rounds=10)
    ops_s = 2 * size**3 / seconds
    suite.add(f"product {size}, {suite.scale.dtype}".replace("torch.", ""), ops_s / 1e12, "Top/s")
    return ops_s


def _eight_bit_product(suite: Suite) -> None:
    """The same in eight bits, where torch has them."""
    size, device = suite.scale.matmul_size, suite.device
    x, y = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    left, right = x, y.t()  # the second operand's columns lie one after the other
    one = torch.ones((), device=device)

    def multiply() -> object:
        return torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    try:
        seconds = seconds_per_call([multiply], suite.device, num_rounds=10)
    except RuntimeError as error:  # cards before sm_89
        suite.note(f"no product of 8 bits: {str(error).splitlines()[0]}")
        return
    suite.add(f"product {size}, float8_e4m3", 2 * size**3 / seconds / 1e12, "Top/s")


def _graph_gap(suite: Suite) -> None:
    """Time of a kernel that does nothing, in a graph of as many as a step has."""
    num_nodes = suite.scale.num_graph_nodes
    cell = torch.zeros(1, device=suite.device)
    seconds = seconds_per_call(
        [lambda: cell.add_(1)] * num_nodes, suite.device, num_rounds=suite.scale.num_rounds
    )
    suite.add(f"kernel in a graph of {num_nodes}", seconds * 1e6, "us")


def _way_to_host(suite: Suite) -> None:
    """From the launch of a kernel to the sight of its 1 KiB in pinned memory."""
    values = torch.zeros(512, dtype=torch.int16, device=suite.device)
    host = torch.zeros(512, dtype=torch.int16, pin_memory=True)
    launches, arrivals = [], []
    for number in range(1, 200):
        synchronize(suite.device)
        start = time.perf_counter()
        values.fill_(number)
        host.copy_(values, non_blocking=True)
        launched = time.perf_counter()
        seen = host.numpy()
        while seen[-1] != number:
            if time.perf_counter() - start > 1:
                raise RuntimeError("what a kernel wrote was not seen in pinned memory")
        launches.append(launched - start)
        arrivals.append(time.perf_counter() - start)
    suite.add("launch of a kernel and a copy", median(launches) * 1e6, "us")
    suite.add("launch to sight in pinned memory", median(arrivals) * 1e6, "us")
