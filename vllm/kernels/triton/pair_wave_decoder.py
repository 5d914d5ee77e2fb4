"""Convolutions over time on tensor cores, in pairs of bfloat16 that stand for a float32 each.

The form for CUDA of ``kernels.pair_wave_decoder``. A number is a high part, which is its bfloat16,
and a low part, which is that of the rest. A product of pairs is three products of bfloat16, high
with high, high with low and low with high, summed in float32; all else is float32. Activations are
channels-last, so a convolution is one product per tap, whose rows are the positions. Knows no codec.

Windows share no row of a tile, and every output is one chain of sums over taps and channels, the
same for any number of windows; so a window has the same bits alone and beside others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm.kernels.conv_config import ConvConfig

__all__ = [
    "convolve",
    "convolve_kernel",
    "convolve_to_samples",
    "samples_kernel",
    "sum_codes",
    "sum_codes_kernel",
]

Pair = tuple[Tensor, Tensor]  # high and low, bfloat16 of one shape

_SAMPLES_BLOCK_ROWS = 128
_NUM_WARPS = 4


def sum_codes(codes: Tensor, table: Tensor, bias: Tensor, out: Pair) -> None:
    """Sums of a row of the table per codebook, and of the bias.

    Args:
        codes: integers [batch, K, num_frames], each one the codebook's.
        table: float32 [K * codebook_size, C].
        bias: float32 [C].
        out: [batch, num_frames, width], zeros from C on.
    """
    batch, num_codebooks, num_frames = codes.shape
    sum_codes_kernel[(num_frames, batch)](
        *(codes, table, bias, *out),
        num_frames,
        NUM_CODEBOOKS=num_codebooks,
        CODEBOOK_SIZE=len(table) // num_codebooks,
        NUM_COLUMNS=table.shape[1],
        NUM_OUTPUTS=out[0].shape[2],
        BLOCK_OUTPUTS=triton.next_power_of_2(out[0].shape[2]),
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )


def convolve(
    x: Pair,
    weight: Pair,
    bias: Tensor,
    snake: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    out: Pair,
    plain: Tensor | None,
    config: ConvConfig,
    *,
    dilation: int,
    shift: int,
) -> None:
    """One convolution, and what surrounds it in float32: bias, residual, the next layer's Snake.

    Args:
        x: [batch, num_rows, I]; zeros stand on either side.
        weight: [M, num_taps * I], of which tap ``t`` of output row ``r`` takes input row
            ``r + (t - num_taps // 2) * dilation``.
        bias: float32 [M].
        snake: alpha and its inverse, float32 [M] each, of what reads the result next.
        residual: float32 like ``plain``, which is added; the same memory may do for both.
        out: [batch, num_rows * M / width, width]; M is a multiple of ``width``, which is to say
            that a row of the product is M / width rows of the result.
        plain: float32 like ``out``, which gets the result ahead of the Snake.
        config: how the product is cut.
        dilation: rows between taps.
        shift: values by which the result begins later than the product, whose last row is then one
            more.
    """
    batch, num_rows, num_inputs = x[0].shape
    num_outputs, num_products = weight[0].shape
    alpha, inverse = snake or (None, None)
    convolve_kernel[config.grid(batch, num_rows + (shift > 0), num_outputs)](
        *(*x, *weight, bias, alpha, inverse, residual, *out, plain),
        dilation,
        num_rows,
        NUM_OUTPUTS=num_outputs,
        NUM_INPUTS=num_inputs,
        NUM_TAPS=num_products // num_inputs,
        SHIFT=shift,
        BLOCK_ROWS=config.block_rows,
        BLOCK_OUTPUTS=config.block_outputs,
        BLOCK_INPUTS=config.block_inputs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        # Whether a product and a sum are rounded once or twice must not depend on the tile.
        enable_fp_fusion=False,
    )


def convolve_to_samples(
    x: Pair, weight: Tensor, bias: Tensor, samples: Tensor, *, dilation: int
) -> None:
    """The convolution with one output, too narrow for tensor cores, cut off at -1 and 1.

    Args:
        x: as of ``convolve``.
        weight: float32 [num_taps, I].
        bias: float32 [1].
        samples: float32 [batch, num_rows].
        dilation: rows between taps.
    """
    batch, num_rows, num_inputs = x[0].shape
    samples_kernel[(triton.cdiv(num_rows, _SAMPLES_BLOCK_ROWS), batch)](
        *(*x, weight, bias, samples),
        dilation,
        num_rows,
        NUM_INPUTS=num_inputs,
        NUM_TAPS=len(weight),
        BLOCK_ROWS=_SAMPLES_BLOCK_ROWS,
        BLOCK_INPUTS=triton.next_power_of_2(num_inputs),
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["num_frames"], do_not_specialize_on_alignment=["codes_ptr"])
def sum_codes_kernel(
    codes_ptr,
    table_ptr,
    bias_ptr,
    high_ptr,
    low_ptr,
    num_frames,
    NUM_CODEBOOKS: tl.constexpr,
    CODEBOOK_SIZE: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    frame, window = tl.program_id(0), tl.program_id(1)
    outputs = tl.arange(0, BLOCK_OUTPUTS)
    is_column = outputs < NUM_COLUMNS
    total = tl.zeros((BLOCK_OUTPUTS,), tl.float32)
    for codebook in tl.static_range(NUM_CODEBOOKS):
        code = tl.load(codes_ptr + (window * NUM_CODEBOOKS + codebook) * num_frames + frame)
        row = codebook * CODEBOOK_SIZE + code.to(tl.int32)
        total += tl.load(table_ptr + row * NUM_COLUMNS + outputs, mask=is_column, other=0.0)
    total += tl.load(bias_ptr + outputs, mask=is_column, other=0.0)
    at = (window * num_frames + frame).to(tl.int64) * NUM_OUTPUTS + outputs
    _store_pair(high_ptr, low_ptr, at, total, outputs < NUM_OUTPUTS)


# Compiled once for all lengths, numbers of windows and dilations.
@triton.jit(do_not_specialize=["dilation", "num_rows"])
def convolve_kernel(
    high_ptr,
    low_ptr,
    weight_high_ptr,
    weight_low_ptr,
    bias_ptr,
    alpha_ptr,
    inverse_ptr,
    residual_ptr,
    out_high_ptr,
    out_low_ptr,
    plain_ptr,
    dilation,
    num_rows,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,  # a multiple of BLOCK_INPUTS
    NUM_TAPS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    # Outputs beyond the last repeat it.
    columns = tl.minimum(outputs, NUM_OUTPUTS - 1)
    first_row = tl.program_id(2).to(tl.int64) * num_rows
    high_ptr += first_row * NUM_INPUTS
    low_ptr += first_row * NUM_INPUTS
    NUM_BLOCKS: tl.constexpr = NUM_INPUTS // BLOCK_INPUTS
    within = tl.arange(0, BLOCK_INPUTS)

    total = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
    for step in range(0, NUM_TAPS * NUM_BLOCKS):
        tap_rows = rows + (step // NUM_BLOCKS - NUM_TAPS // 2) * dilation
        is_there = ((tap_rows >= 0) & (tap_rows < num_rows))[:, None]
        inputs = step % NUM_BLOCKS * BLOCK_INPUTS + within
        at = tap_rows[:, None] * NUM_INPUTS + inputs[None, :]
        high = tl.load(high_ptr + at, mask=is_there, other=0.0)
        low = tl.load(low_ptr + at, mask=is_there, other=0.0)
        products = (step * BLOCK_INPUTS + within)[:, None]
        at = columns[None, :] * (NUM_TAPS * NUM_INPUTS) + products
        weight_high = tl.load(weight_high_ptr + at)
        weight_low = tl.load(weight_low_ptr + at)
        total = tl.dot(high, weight_high, total)
        total = tl.dot(high, weight_low, total)
        total = tl.dot(low, weight_high, total)

    total += tl.load(bias_ptr + columns)[None, :]
    at = rows[:, None] * NUM_OUTPUTS + outputs[None, :] - SHIFT
    is_there = (at >= 0) & (at < num_rows * NUM_OUTPUTS) & (outputs < NUM_OUTPUTS)[None, :]
    first = first_row * NUM_OUTPUTS
    if residual_ptr is not None:
        total += tl.load((residual_ptr + first) + at, mask=is_there, other=0.0)
    if plain_ptr is not None:
        tl.store((plain_ptr + first) + at, total, mask=is_there)
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr + columns)[None, :]
        inverse = tl.load(inverse_ptr + columns)[None, :]
        total += _sin_squared(alpha * total) * inverse
    _store_pair(out_high_ptr + first, out_low_ptr + first, at, total, is_there)


@triton.jit(do_not_specialize=["dilation", "num_rows"])
def samples_kernel(
    high_ptr,
    low_ptr,
    weight_ptr,
    bias_ptr,
    samples_ptr,
    dilation,
    num_rows,
    NUM_INPUTS: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inputs = tl.arange(0, BLOCK_INPUTS)
    is_input = inputs < NUM_INPUTS
    first_row = tl.program_id(1).to(tl.int64) * num_rows
    high_ptr += first_row * NUM_INPUTS
    low_ptr += first_row * NUM_INPUTS
    total = tl.zeros((BLOCK_ROWS, BLOCK_INPUTS), tl.float32)
    for tap in tl.static_range(NUM_TAPS):
        tap_rows = rows + (tap - NUM_TAPS // 2) * dilation
        is_there = ((tap_rows >= 0) & (tap_rows < num_rows))[:, None] & is_input[None, :]
        at = tap_rows[:, None] * NUM_INPUTS + inputs[None, :]
        x = tl.load(high_ptr + at, mask=is_there, other=0.0).to(tl.float32)
        x += tl.load(low_ptr + at, mask=is_there, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + tap * NUM_INPUTS + inputs, mask=is_input, other=0.0)
        total += x * weight[None, :]
    samples = tl.sum(total, 1) + tl.load(bias_ptr)
    samples = tl.minimum(tl.maximum(samples, -1.0), 1.0)
    tl.store(samples_ptr + first_row + rows, samples, mask=rows < num_rows)


@triton.jit
def _store_pair(high_ptr, low_ptr, at, values, mask):
    high = values.to(tl.bfloat16)
    tl.store(high_ptr + at, high, mask=mask)
    tl.store(low_ptr + at, (values - high.to(tl.float32)).to(tl.bfloat16), mask=mask)


@triton.jit
def _sin_squared(x):
    """Right to float32's rounding for angles up to 10^4; as ``csrc/vector_math.h`` has it.

    The library's sine keeps a stack for larger ones, and a square has half the period.
    """
    n = tl.floor(x * 0.318309886 + 0.5)
    # pi in three parts, of which the first two times n are exact.
    x = x - n * 3.140625
    x = x - n * 9.67502593994140625e-4
    x = x - n * 1.509957990978376432e-7
    square = x * x
    y = square * 2.60831052e-6 - 1.98108118e-4
    y = y * square + 8.33308366e-3
    y = y * square - 1.66666603e-1
    sine = y * square * x + x
    return sine * sine
