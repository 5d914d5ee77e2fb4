"""The products of a decode step behind their faces, and the embedding that begins it.

Knows no section; see ``kernel_cases``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import floors
from benchmarks.gpu.floors import Work
from benchmarks.gpu.kernel_cases import COLD_BYTES, LIMITS, Case
from benchmarks.gpu.suite import Suite
from vllm.kernels.quantize import QuantizedWeight, WeightFormat, quantize
from vllm.kernels.skinny_linear import (
    LinearWorkspace,
    ResidualRows,
    embed_frames,
    gated_linear,
    normed_linear,
    residual_linear,
)

__all__ = ["embed_case", "linear_cases"]

_EPS = 1e-5

LinearCall = Callable[..., Tensor]  # weight, number of rows, is_fresh -> the product


def linear_cases(suite: Suite, rows: int, *, is_cold: bool, is_fp8: bool = False) -> Iterator[Case]:
    """The products of a decode step, with norm, gate and residual as the step has them.

    With ``is_fp8`` weights are of 8 bits, and inputs of the model's type.
    """
    for name in floors.matrix_shapes(suite.config):
        yield _linear_case(suite, name, rows, is_cold=is_cold, is_fp8=is_fp8)


def _linear_case(suite: Suite, name: str, rows: int, *, is_cold: bool, is_fp8: bool) -> Case:
    shape = floors.matrix_shapes(suite.config)[name]
    num_outputs, num_inputs = shape
    dtype, device = suite.scale.dtype, suite.device
    itemsize = 1 if is_fp8 else dtype.itemsize
    num_bytes = num_outputs * num_inputs * itemsize
    copies = max(COLD_BYTES // num_bytes, 1) if is_cold and suite.is_cuda else 1
    weights = [
        (torch.randn(shape, device=device) * num_inputs**-0.5).to(dtype) for _ in range(copies)
    ]
    kept: list[Tensor | QuantizedWeight] = [*weights]
    exact_weight = weights[0]
    if is_fp8:
        rounded = [quantize(each, WeightFormat.FP8) for each in weights]
        kept, exact_weight = [*rounded], rounded[0].dequantize()
    workspace = LinearWorkspace([shape], rows, dtype=dtype, device=device)
    hidden = torch.randn(rows, num_inputs, device=device).to(dtype)
    gain = (1 + 0.05 * torch.randn(num_inputs, device=device)).to(dtype)
    if name in ("o", "down"):
        run = _residual_call(hidden, num_outputs, workspace)
        exact = _exact_residual
    else:
        is_gated = name == "gate_up"
        run = _normed_call(hidden, gain, num_outputs, workspace, is_gated=is_gated)
        exact = _exact_gated if is_gated else _exact_normed
    scaled = (hidden.float() * gain.float()).to(dtype)
    return Case(
        kernel=f"{name} fp8" if is_fp8 else name,
        shape=f"rows={rows}",
        ours=tuple(lambda w=w: run(w, rows, is_fresh=False) for w in kept),
        torch=tuple(lambda w=w: F.linear(scaled, w) for w in weights),
        num_rows=rows,
        first_rows=lambda count: run(kept[0], count, is_fresh=True).clone(),
        exact=lambda: exact(hidden.double(), gain.double(), exact_weight.double()),
        work=floors.linear(rows, shape, itemsize=itemsize, activation=dtype.itemsize),
        limit=LIMITS[dtype],
    )


def _normed_call(
    hidden: Tensor, gain: Tensor, num_outputs: int, workspace: LinearWorkspace, *, is_gated: bool
) -> LinearCall:
    """Rows as whoever writes the residual stream leaves them, and memory for the product."""
    residual = _residual_rows(hidden, gain)
    width = num_outputs // 2 if is_gated else num_outputs
    out = torch.empty(len(hidden), width, dtype=hidden.dtype, device=hidden.device)
    function = gated_linear if is_gated else normed_linear

    def run(weight: Tensor | QuantizedWeight, count: int, *, is_fresh: bool) -> Tensor:
        function(residual.first(count), _EPS, weight, out[:count], workspace)
        return out[:count]

    return run


def _residual_call(x: Tensor, num_outputs: int, workspace: LinearWorkspace) -> LinearCall:
    """Adds to a stream, of zeros where the call is a fresh one."""
    rows = ResidualRows.allocate(len(x), num_outputs, x.dtype, x.device)
    gain = torch.ones(num_outputs, dtype=x.dtype, device=x.device)

    def run(weight: Tensor | QuantizedWeight, count: int, *, is_fresh: bool) -> Tensor:
        part = rows.first(count)
        if is_fresh:
            part.hidden.zero_()
        residual_linear(x[:count], weight, gain, part, workspace)
        return part.hidden

    return run


def _residual_rows(hidden: Tensor, gain: Tensor) -> ResidualRows:
    rows = ResidualRows.allocate(len(hidden), hidden.shape[1], hidden.dtype, hidden.device)
    rows.hidden.copy_(hidden)
    rows.scaled.copy_(hidden.float() * gain.float())
    width = hidden.shape[1] // len(rows.square_sums)
    rows.square_sums.copy_(hidden.float().square().unflatten(1, (-1, width)).sum(-1).t())
    return rows


def _exact_normed(hidden: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
    normed = hidden * gain * (hidden.square().mean(-1, keepdim=True) + _EPS).rsqrt()
    return normed @ weight.t()


def _exact_gated(hidden: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
    gate, up = _exact_normed(hidden, gain, weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def _exact_residual(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def embed_case(suite: Suite, rows: int) -> Case:
    """The codes of the last frames as the beginning of the residual stream."""
    config, dtype, device = suite.config, suite.scale.dtype, suite.device
    num_codebooks, size = config.num_codebooks, config.hidden_size
    table = torch.randn(num_codebooks * config.codebook_size, size, device=device).to(dtype)
    frames = torch.randint(config.codebook_size, (rows, num_codebooks), device=device)
    offsets = torch.arange(num_codebooks, device=device) * config.codebook_size
    index = torch.arange(rows, device=device)
    gain = torch.ones(size, dtype=dtype, device=device)
    workspace = LinearWorkspace([], rows, dtype=dtype, device=device)
    residual = ResidualRows.allocate(rows, size, dtype, device)

    def run(count: int) -> Tensor:
        part = residual.first(count)
        embed_frames(frames, index[:count], table, gain, part, workspace)
        return part.hidden

    num_bytes = rows * size * dtype.itemsize * (num_codebooks + 2)
    return Case(
        kernel="embed",
        shape=f"rows={rows}",
        ours=(lambda: run(rows),),
        torch=(lambda: F.embedding(frames + offsets, table).sum(1),),
        num_rows=rows,
        first_rows=lambda count: run(count).clone(),
        exact=lambda: table.double()[frames + offsets].sum(1),
        work=Work(num_bytes),
        limit=LIMITS[dtype],
    )
