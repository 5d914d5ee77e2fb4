"""Products of few rows with large matrices: one main loop, and an epilogue for each of their uses.

The form for CUDA of ``kernels.skinny_linear``. The matrix is the wide operand of the tensor cores
and the rows are the narrow one, so that one row pays for 16 and not for 64. Knows no table of
configurations and no model.

A result has the same bits whatever the number of rows. Every output is a chain of products in the
order of its inputs, cut into runs (splits) that are added in their order; how wide a tile of rows
is changes neither. Sums of squares are a tree that is written out, since the order within
``tl.sum`` follows the layout of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm.kernels.dependent_launch import DependentLaunch
from vllm.kernels.linear_config import SUM_WIDTH, LinearConfig

__all__ = [
    "gated_linear",
    "gated_linear_kernel",
    "linear",
    "linear_kernel",
    "residual_linear",
    "residual_linear_kernel",
]

# Rows [N, K]; a matrix [M, K] of their type, float8_e4m3fn or int8, and its scales, float32 [M] or
# None. Or the finished product [N, M], and None for both.
Operands = tuple[Tensor, Tensor | None, Tensor | None]

_SUM_WIDTH = tl.constexpr(SUM_WIDTH)
_LARGEST_HALF = tl.constexpr(65504.0)
_LINE_BYTES = tl.constexpr(128)  # what one prefetch brings


def linear(
    operands: Operands,
    square_sums: Tensor | None,
    eps: float,
    out: Tensor,
    partials: Tensor,
    counters: Tensor,
    config: LinearConfig,
    *,
    pdl: DependentLaunch = DependentLaunch.OFF,
) -> None:
    """``out = (x weight^T) * scales``, times one over the RMS of the rows where sums are given.

    Args:
        operands: x, weight and scales.
        square_sums: float32 [H / 64, N], sums of squares of the rows before their norm.
        eps: of the norm.
        out: [N, M].
        partials: float32, at least ``config.num_partials(N, M)``.
        counters: int32, zeros, at least one per tile; zeros again afterwards.
        config: how the work is cut.
        pdl: whether the kernel may start before the one ahead of it has ended.
    """
    num_outputs = out.shape[1]
    linear_kernel[config.grid(len(out), num_outputs)](
        *(*operands, square_sums, out, partials, counters, eps),
        0 if square_sums is None else square_sums.stride(0),
        len(out),
        NUM_OUTPUTS=num_outputs,
        NUM_INPUTS=operands[0].shape[1],
        NUM_SUMS=0 if square_sums is None else len(square_sums),
        **_splits(config),
        **_blocks(config),
        **_options(config, pdl),
    )


def gated_linear(
    operands: Operands,
    square_sums: Tensor,
    eps: float,
    out: Tensor,
    config: LinearConfig,
    *,
    pdl: DependentLaunch = DependentLaunch.OFF,
) -> None:
    """``silu(gate) * up`` of the two halves of a product as of ``linear``; ``out`` is [N, M / 2]."""
    num_outputs = out.shape[1]
    gated_linear_kernel[config.grid(len(out), num_outputs)](
        *(*operands, square_sums, out),
        eps,
        square_sums.stride(0),
        len(out),
        NUM_OUTPUTS=num_outputs,
        NUM_INPUTS=operands[0].shape[1],
        NUM_SUMS=len(square_sums),
        **_blocks(config),
        **_options(config, pdl),
    )


def residual_linear(
    operands: Operands,
    gain: Tensor,
    hidden: Tensor,
    scaled: Tensor,
    square_sums: Tensor,
    partials: Tensor,
    counters: Tensor,
    config: LinearConfig,
    *,
    pdl: DependentLaunch = DependentLaunch.OFF,
) -> None:
    """Add a product as of ``linear`` to ``hidden`` [N, M], and prepare the next norm.

    Writes ``scaled`` [N, M], ``hidden`` times ``gain`` [M], and ``square_sums`` float32 [M / 64, N]
    of ``hidden``.
    """
    num_outputs = hidden.shape[1]
    residual_linear_kernel[config.grid(len(hidden), num_outputs)](
        *(*operands, gain, hidden, scaled, square_sums, partials, counters),
        square_sums.stride(0),
        len(hidden),
        NUM_OUTPUTS=num_outputs,
        NUM_INPUTS=operands[0].shape[1],
        **_splits(config),
        **_blocks(config),
        **_options(config, pdl),
    )


def _blocks(config: LinearConfig) -> dict[str, int]:
    return {
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_OUTPUTS": config.block_outputs,
        "BLOCK_INPUTS": config.block_inputs,
    }


def _splits(config: LinearConfig) -> dict[str, int]:
    return {"SPLIT_INPUTS": config.split_inputs, "IS_SEQUENTIAL": config.is_sequential}


def _options(config: LinearConfig, pdl: DependentLaunch) -> dict[str, int]:
    options: dict[str, int] = {
        "PDL": pdl.is_on,
        "PREFETCHES": pdl.prefetches,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Whether a product and a sum are rounded once or twice must not depend on the tile.
        "enable_fp_fusion": False,
    }
    return options | {"launch_pdl": True} if pdl.is_on else options


# Compiled once for all numbers of rows, and wherever their sums begin among those of others.
@triton.jit(
    do_not_specialize=["sums_stride", "num_rows"], do_not_specialize_on_alignment=["sums_ptr"]
)
def linear_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    sums_ptr,
    out_ptr,
    partials_ptr,
    counters_ptr,
    eps,
    sums_stride,
    num_rows,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    IS_SEQUENTIAL: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCHES: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    if PDL:
        if PREFETCHES:
            _prefetch(weight_ptr, outputs, NUM_OUTPUTS, NUM_INPUTS, BLOCK_INPUTS, SPLIT_INPUTS)
        tl.extra.cuda.gdc_wait()
    if weight_ptr is None:
        total = _load_tile(x_ptr, rows, outputs, num_rows, NUM_OUTPUTS, NUM_OUTPUTS)
    else:
        total = _product(
            x_ptr,
            weight_ptr,
            rows,
            outputs,
            num_rows,
            NUM_OUTPUTS,
            NUM_INPUTS,
            BLOCK_INPUTS,
            SPLIT_INPUTS,
            IS_SEQUENTIAL,
        )
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT_INPUTS < NUM_INPUTS and not IS_SEQUENTIAL:
        NUM_SPLITS: tl.constexpr = (NUM_INPUTS + SPLIT_INPUTS - 1) // SPLIT_INPUTS
        if not _arrives_last(total, partials_ptr, counters_ptr, NUM_SPLITS):
            return
        total = _sum_partials(partials_ptr, BLOCK_OUTPUTS, BLOCK_ROWS, NUM_SPLITS)

    total = _scale_outputs(total, scales_ptr, outputs, NUM_OUTPUTS)
    if sums_ptr is not None:
        total *= _inverse_rms(sums_ptr, sums_stride, rows, num_rows, NUM_SUMS, eps)[None, :]
    _store_tile(out_ptr, total, rows, outputs, num_rows, NUM_OUTPUTS)


@triton.jit(
    do_not_specialize=["sums_stride", "num_rows"], do_not_specialize_on_alignment=["sums_ptr"]
)
def gated_linear_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    sums_ptr,
    out_ptr,
    eps,
    sums_stride,
    num_rows,
    NUM_OUTPUTS: tl.constexpr,  # half of the rows of the weight
    NUM_INPUTS: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCHES: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    ups = NUM_OUTPUTS + outputs
    if PDL:
        if PREFETCHES:
            _prefetch(weight_ptr, outputs, 2 * NUM_OUTPUTS, NUM_INPUTS, BLOCK_INPUTS, NUM_INPUTS)
            _prefetch(weight_ptr, ups, 2 * NUM_OUTPUTS, NUM_INPUTS, BLOCK_INPUTS, NUM_INPUTS)
        tl.extra.cuda.gdc_wait()
    if weight_ptr is None:
        gate = _load_tile(x_ptr, rows, outputs, num_rows, NUM_OUTPUTS, 2 * NUM_OUTPUTS)
        up = _load_tile(x_ptr + NUM_OUTPUTS, rows, outputs, num_rows, NUM_OUTPUTS, 2 * NUM_OUTPUTS)
    else:
        gate = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), tl.float32)
        up = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), tl.float32)
        for first in range(0, NUM_INPUTS, BLOCK_INPUTS):
            inputs = first + tl.arange(0, BLOCK_INPUTS)
            x = _load_inputs(x_ptr, rows, inputs, num_rows, NUM_INPUTS, BLOCK_INPUTS)
            gates = _load_weight(
                weight_ptr, outputs, inputs, 2 * NUM_OUTPUTS, NUM_INPUTS, BLOCK_INPUTS
            )
            gate = tl.dot(gates.to(x.dtype), x, gate, input_precision="ieee")
            more = _load_weight(weight_ptr, ups, inputs, 2 * NUM_OUTPUTS, NUM_INPUTS, BLOCK_INPUTS)
            up = tl.dot(more.to(x.dtype), x, up, input_precision="ieee")
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    gate = _scale_outputs(gate, scales_ptr, outputs, NUM_OUTPUTS)
    up = _scale_outputs(up, scales_ptr, ups, 2 * NUM_OUTPUTS)
    inverse = _inverse_rms(sums_ptr, sums_stride, rows, num_rows, NUM_SUMS, eps)[None, :]
    gate *= inverse
    gated = gate * tl.sigmoid(gate) * (up * inverse)
    _store_tile(out_ptr, gated, rows, outputs, num_rows, NUM_OUTPUTS)


@triton.jit(
    do_not_specialize=["sums_stride", "num_rows"], do_not_specialize_on_alignment=["sums_ptr"]
)
def residual_linear_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    gain_ptr,
    hidden_ptr,
    scaled_ptr,
    sums_ptr,
    partials_ptr,
    counters_ptr,
    sums_stride,
    num_rows,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    IS_SEQUENTIAL: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCHES: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    if PDL:
        if PREFETCHES:
            _prefetch(weight_ptr, outputs, NUM_OUTPUTS, NUM_INPUTS, BLOCK_INPUTS, SPLIT_INPUTS)
        tl.extra.cuda.gdc_wait()
    if weight_ptr is None:
        total = _load_tile(x_ptr, rows, outputs, num_rows, NUM_OUTPUTS, NUM_OUTPUTS)
    else:
        total = _product(
            x_ptr,
            weight_ptr,
            rows,
            outputs,
            num_rows,
            NUM_OUTPUTS,
            NUM_INPUTS,
            BLOCK_INPUTS,
            SPLIT_INPUTS,
            IS_SEQUENTIAL,
        )
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT_INPUTS < NUM_INPUTS and not IS_SEQUENTIAL:
        NUM_SPLITS: tl.constexpr = (NUM_INPUTS + SPLIT_INPUTS - 1) // SPLIT_INPUTS
        if not _arrives_last(total, partials_ptr, counters_ptr, NUM_SPLITS):
            return
        total = _sum_partials(partials_ptr, BLOCK_OUTPUTS, BLOCK_ROWS, NUM_SPLITS)

    total = _scale_outputs(total, scales_ptr, outputs, NUM_OUTPUTS)
    total += _load_tile(hidden_ptr, rows, outputs, num_rows, NUM_OUTPUTS, NUM_OUTPUTS)
    gain = tl.load(gain_ptr + outputs).to(tl.float32)
    store_residual(
        total,
        gain,
        hidden_ptr,
        scaled_ptr,
        sums_ptr,
        sums_stride,
        rows,
        outputs,
        num_rows,
        NUM_OUTPUTS,
    )


@triton.jit
def _product(
    x_ptr,
    weight_ptr,
    rows,
    outputs,
    num_rows,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    IS_SEQUENTIAL: tl.constexpr,
):
    """The product of this program's split; or of all, one after another, with the same bits."""
    if IS_SEQUENTIAL:
        total = tl.zeros((outputs.shape[0], rows.shape[0]), tl.float32)
        for first in range(0, NUM_INPUTS, SPLIT_INPUTS):
            total += _split_product(
                x_ptr,
                weight_ptr,
                rows,
                outputs,
                num_rows,
                first,
                NUM_OUTPUTS,
                NUM_INPUTS,
                BLOCK_INPUTS,
                SPLIT_INPUTS,
            )
        return total
    else:
        return _split_product(
            x_ptr,
            weight_ptr,
            rows,
            outputs,
            num_rows,
            tl.program_id(2) * SPLIT_INPUTS,
            NUM_OUTPUTS,
            NUM_INPUTS,
            BLOCK_INPUTS,
            SPLIT_INPUTS,
        )


@triton.jit
def _split_product(
    x_ptr,
    weight_ptr,
    rows,
    outputs,
    num_rows,
    first,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
):
    """The product over the inputs of a split from ``first``: [outputs, rows]."""
    total = tl.zeros((outputs.shape[0], rows.shape[0]), tl.float32)
    for start in range(0, SPLIT_INPUTS, BLOCK_INPUTS):
        inputs = first + start + tl.arange(0, BLOCK_INPUTS)
        x = _load_inputs(x_ptr, rows, inputs, num_rows, NUM_INPUTS, SPLIT_INPUTS)
        weight = _load_weight(weight_ptr, outputs, inputs, NUM_OUTPUTS, NUM_INPUTS, SPLIT_INPUTS)
        total = tl.dot(weight.to(x.dtype), x, total, input_precision="ieee")
    return total


@triton.jit
def _load_inputs(
    x_ptr, rows, inputs, num_rows, NUM_INPUTS: tl.constexpr, SPLIT_INPUTS: tl.constexpr
):
    """Columns of ``x`` [N, NUM_INPUTS] as [inputs, rows], zeros beyond both."""
    is_there = rows[None, :] < num_rows
    if NUM_INPUTS % SPLIT_INPUTS != 0:
        is_there &= inputs[:, None] < NUM_INPUTS
    return tl.load(x_ptr + rows[None, :] * NUM_INPUTS + inputs[:, None], mask=is_there, other=0.0)


@triton.jit
def _load_weight(
    weight_ptr,
    outputs,
    inputs,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
):
    """[outputs, inputs], zeros beyond the inputs; outputs beyond the last repeat it."""
    outputs = tl.minimum(outputs, NUM_OUTPUTS - 1)
    at = weight_ptr + outputs[:, None] * NUM_INPUTS + inputs[None, :]
    if NUM_INPUTS % SPLIT_INPUTS != 0:
        return tl.load(at, mask=inputs[None, :] < NUM_INPUTS, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _prefetch(
    weight_ptr,
    outputs,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
):
    """Ask L2 for the first block of weights while the kernel ahead still runs."""
    if weight_ptr is not None:
        LINE: tl.constexpr = _LINE_BYTES * 8 // weight_ptr.dtype.element_ty.primitive_bitwidth
        lines = tl.program_id(2) * SPLIT_INPUTS + tl.arange(0, BLOCK_INPUTS // LINE) * LINE
        lines = tl.minimum(lines, NUM_INPUTS - 1)
        outputs = tl.minimum(outputs, NUM_OUTPUTS - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [weight_ptr + outputs[:, None] * NUM_INPUTS + lines[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _partial_places(OUTPUTS: tl.constexpr, ROWS: tl.constexpr):
    """Places of a tile's first partial sums [OUTPUTS, ROWS], and how far the next split's are."""
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    inside = tl.arange(0, OUTPUTS)[:, None] + tl.arange(0, ROWS)[None, :] * OUTPUTS
    stride = tl.num_programs(0) * tl.num_programs(1) * (OUTPUTS * ROWS)
    return tile * (OUTPUTS * ROWS) + inside, stride


@triton.jit
def _arrives_last(total, partials_ptr, counters_ptr, NUM_SPLITS: tl.constexpr):
    """Keep a split's sums; whether all splits of the tile have kept theirs."""
    places, stride = _partial_places(total.shape[0], total.shape[1])
    tl.store(partials_ptr + tl.program_id(2) * stride + places, total)
    # The release below is one thread's; it speaks for the stores of all once they have met here.
    tl.debug_barrier()
    counter = counters_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == NUM_SPLITS - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def _sum_partials(
    partials_ptr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, NUM_SPLITS: tl.constexpr
):
    """The sums of all splits, added in their order and read past L1, which may hold old ones."""
    places, stride = _partial_places(OUTPUTS, ROWS)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(partials_ptr + split * stride + places, cache_modifier=".cg")
    return total


@triton.jit
def _scale_outputs(total, scales_ptr, outputs, NUM_OUTPUTS: tl.constexpr):
    if scales_ptr is not None:
        scales = tl.load(scales_ptr + outputs, mask=outputs < NUM_OUTPUTS, other=0.0)
        total *= scales[:, None]
    return total


@triton.jit
def _inverse_rms(sums_ptr, sums_stride, rows, num_rows, NUM_SUMS: tl.constexpr, eps):
    """One over the root mean square of each row, from its sums of squares."""
    places = tl.arange(0, triton.next_power_of_2(NUM_SUMS))
    is_there = (places[:, None] < NUM_SUMS) & (rows[None, :] < num_rows)
    at = sums_ptr + places[:, None] * sums_stride + rows[None, :]
    total = _sum_in_order(tl.load(at, mask=is_there, other=0.0), triton.next_power_of_2(NUM_SUMS))
    mean = tl.reshape(total, (rows.shape[0],)) / (NUM_SUMS * _SUM_WIDTH)
    return tl.rsqrt(mean + eps)


@triton.jit
def _load_tile(ptr, rows, outputs, num_rows, NUM_OUTPUTS: tl.constexpr, STRIDE: tl.constexpr):
    """Columns of a matrix [N, STRIDE] as float32 [outputs, rows]."""
    is_there = (rows[None, :] < num_rows) & (outputs[:, None] < NUM_OUTPUTS)
    at = ptr + rows[None, :] * STRIDE + outputs[:, None]
    return tl.load(at, mask=is_there, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(ptr, values, rows, outputs, num_rows, NUM_OUTPUTS: tl.constexpr):
    is_there = (rows[None, :] < num_rows) & (outputs[:, None] < NUM_OUTPUTS)
    at = ptr + rows[None, :] * NUM_OUTPUTS + outputs[:, None]
    tl.store(at, _rounded(values, ptr.dtype.element_ty), mask=is_there)


@triton.jit
def store_residual(
    total,
    gain,
    hidden_ptr,
    scaled_ptr,
    sums_ptr,
    sums_stride,
    rows,
    outputs,
    num_rows,
    NUM_OUTPUTS: tl.constexpr,
):
    """Write a tile [outputs, rows] of the residual stream, and what the next norm needs of it."""
    hidden = _rounded(total, hidden_ptr.dtype.element_ty)
    _store_tile(hidden_ptr, hidden, rows, outputs, num_rows, NUM_OUTPUTS)
    values = hidden.to(tl.float32)
    _store_tile(scaled_ptr, values * gain[:, None], rows, outputs, num_rows, NUM_OUTPUTS)
    TILES: tl.constexpr = outputs.shape[0] // _SUM_WIDTH
    tiles = tl.min(outputs) // _SUM_WIDTH + tl.arange(0, TILES)
    tl.store(
        sums_ptr + tiles[:, None] * sums_stride + rows[None, :],
        _sum_in_order(values * values, _SUM_WIDTH),
        mask=rows[None, :] < num_rows,
    )


@triton.jit
def _sum_in_order(values, COUNT: tl.constexpr):
    """[M, rows] -> [M / COUNT, rows]: neighbours are added, then neighbouring sums, and so on."""
    if COUNT == 1:
        return values
    else:
        pairs = tl.reshape(values, (values.shape[0] // 2, 2, values.shape[1]))
        left, right = tl.split(tl.permute(pairs, (0, 2, 1)))
        return _sum_in_order(left + right, COUNT // 2)


@triton.jit
def _rounded(values, dtype: tl.constexpr):
    """``values`` as ``dtype``; what float16 cannot hold becomes its largest number."""
    if dtype == tl.float16 and values.dtype == tl.float32:
        values = tl.minimum(tl.maximum(values, -_LARGEST_HALF), _LARGEST_HALF)
    return values.to(dtype)
