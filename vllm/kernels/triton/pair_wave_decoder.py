"""Convolutions over time on tensor cores, in pairs of bfloat16 that stand for a float32 each.

The form for CUDA of ``kernels.pair_wave_decoder``. A number is a high part, which is its bfloat16,
and a low part, which is that of the rest. A product of pairs is three products of bfloat16, high
with high, high with low and low with high, summed in float32; all else is float32. Activations are
channels-last, so a convolution is one product per tap, whose rows are the positions. Knows no codec.

Windows share no row of a tile, and every output is one chain of sums over taps and channels, the
same for any number of windows and wherever a row lies in its tile. So a window has the same bits
alone and beside others, and some of its rows those that they have among all.
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


def sum_codes(
    codes: Tensor, table: Tensor, bias: Tensor, out: Pair, *, first_frame: int = 0
) -> None:
    """Sums of a row of the table per codebook, and of the bias.

    Args:
        codes: integers [batch, K, num_frames], contiguous, each one the codebook's.
        table: float32 [K * codebook_size, C].
        bias: float32 [C].
        out: [batch, num_rows, width], zeros from C on.
        first_frame: the one that the first row is of.
    """
    batch, num_codebooks, num_frames = codes.shape
    sum_codes_kernel[(out[0].shape[1], batch)](
        *(codes, table, bias, *out),
        num_frames,
        first_frame,
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
    num_steps: int,
    first_row: int = 0,
    shift: int = 0,
) -> None:
    """One convolution, and what surrounds it in float32: bias, residual, the next layer's Snake.

    Args:
        x: [batch, num_rows, I]; zeros stand on either side.
        weight: [M, num_taps * I], of which tap ``t`` of step ``s`` takes input row
            ``first_row + s + (t - num_taps // 2) * dilation``.
        bias: float32 [M].
        snake: alpha and its inverse, float32 [M] each, of what reads the result next.
        residual: float32 like ``plain``, which is added; the same memory may do for both.
        out: [batch, num_outputs, width]; M is a multiple of ``width``, which is to say that a step
            is M / width rows of the result.
        plain: float32 like ``out``, which gets the result ahead of the Snake; rows of a larger
            tensor do.
        config: how the product is cut.
        dilation: rows between taps.
        num_steps: rows of the product.
        first_row: of the input, the one that the first step is at.
        shift: rows of the product ahead of the first one of the result, which need not end where
            the product does.
    """
    batch, num_rows, num_inputs = x[0].shape
    num_outputs, num_products = weight[0].shape
    alpha, inverse = snake or (None, None)
    convolve_kernel[config.grid(batch, num_steps, num_outputs)](
        *(*x, *weight, bias, alpha, inverse, residual, *out, plain),
        dilation,
        num_rows,
        first_row,
        out[0].shape[1],
        shift,
        _rows_between_windows(residual, plain),
        NUM_OUTPUTS=num_outputs,
        NUM_INPUTS=num_inputs,
        NUM_TAPS=num_products // num_inputs,
        WIDTH=out[0].shape[2],
        BLOCK_ROWS=config.block_rows,
        BLOCK_OUTPUTS=config.block_outputs,
        BLOCK_INPUTS=config.block_inputs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        # Whether a product and a sum are rounded once or twice must not depend on the tile.
        enable_fp_fusion=False,
    )


def _rows_between_windows(*tensors: Tensor | None) -> int:
    """From one window to the next in tensors that are rows of the same larger one; 0 for none."""
    found = {each.stride(0) // each.shape[2] for each in tensors if each is not None}
    assert len(found) <= 1
    return found.pop() if found else 0


def convolve_to_samples(
    x: Pair, weight: Tensor, bias: Tensor, samples: Tensor, *, dilation: int, first_row: int = 0
) -> None:
    """The convolution with one output, too narrow for tensor cores, cut off at -1 and 1.

    Args:
        x: as of ``convolve``.
        weight: float32 [num_taps, I].
        bias: float32 [1].
        samples: float32 [batch, num_samples].
        dilation: rows between taps.
        first_row: of the input, the one that the first sample is at.
    """
    batch, num_rows, num_inputs = x[0].shape
    num_samples = samples.shape[1]
    samples_kernel[(triton.cdiv(num_samples, _SAMPLES_BLOCK_ROWS), batch)](
        *(*x, weight, bias, samples),
        dilation,
        num_rows,
        first_row,
        num_samples,
        NUM_INPUTS=num_inputs,
        NUM_TAPS=len(weight),
        BLOCK_ROWS=_SAMPLES_BLOCK_ROWS,
        BLOCK_INPUTS=triton.next_power_of_2(num_inputs),
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )


@triton.jit(
    do_not_specialize=["num_frames", "first_frame"], do_not_specialize_on_alignment=["codes_ptr"]
)
def sum_codes_kernel(
    codes_ptr,
    table_ptr,
    bias_ptr,
    high_ptr,
    low_ptr,
    num_frames,
    first_frame,
    NUM_CODEBOOKS: tl.constexpr,
    CODEBOOK_SIZE: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    row, window = tl.program_id(0), tl.program_id(1)
    codes_ptr += window * NUM_CODEBOOKS * num_frames + first_frame + row
    outputs = tl.arange(0, BLOCK_OUTPUTS)
    is_column = outputs < NUM_COLUMNS
    total = tl.zeros((BLOCK_OUTPUTS,), tl.float32)
    for codebook in tl.static_range(NUM_CODEBOOKS):
        code = tl.load(codes_ptr + codebook * num_frames)
        entry = codebook * CODEBOOK_SIZE + code.to(tl.int32)
        total += tl.load(table_ptr + entry * NUM_COLUMNS + outputs, mask=is_column, other=0.0)
    total += tl.load(bias_ptr + outputs, mask=is_column, other=0.0)
    at = (window * tl.num_programs(0) + row).to(tl.int64) * NUM_OUTPUTS + outputs
    _store_pair(high_ptr, low_ptr, at, total, outputs < NUM_OUTPUTS)


# Compiled once for all lengths, parts, numbers of windows and dilations.
@triton.jit(
    do_not_specialize=[
        *("dilation", "num_rows", "first_row", "num_out_rows", "shift", "num_plain_rows")
    ]
)
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
    num_rows,  # of a window of the input
    first_row,
    num_out_rows,  # of a window of the result
    shift,
    num_plain_rows,  # from one window of residual and plain to the next
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,  # a multiple of BLOCK_INPUTS
    NUM_TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    steps = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    # Outputs beyond the last repeat it.
    columns = tl.minimum(outputs, NUM_OUTPUTS - 1)
    window = tl.program_id(2).to(tl.int64)
    high_ptr += window * num_rows * NUM_INPUTS
    low_ptr += window * num_rows * NUM_INPUTS
    rows = first_row + steps
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
    at = steps[:, None] * NUM_OUTPUTS + outputs[None, :] - shift * WIDTH
    is_there = (at >= 0) & (at < num_out_rows * WIDTH) & (outputs < NUM_OUTPUTS)[None, :]
    first_plain = window * num_plain_rows * WIDTH
    if residual_ptr is not None:
        total += tl.load((residual_ptr + first_plain) + at, mask=is_there, other=0.0)
    if plain_ptr is not None:
        tl.store((plain_ptr + first_plain) + at, total, mask=is_there)
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr + columns)[None, :]
        inverse = tl.load(inverse_ptr + columns)[None, :]
        total += _sin_squared(alpha * total) * inverse
    first = window * num_out_rows * WIDTH
    _store_pair(out_high_ptr + first, out_low_ptr + first, at, total, is_there)


@triton.jit(do_not_specialize=["dilation", "num_rows", "first_row", "num_samples"])
def samples_kernel(
    high_ptr,
    low_ptr,
    weight_ptr,
    bias_ptr,
    samples_ptr,
    dilation,
    num_rows,
    first_row,
    num_samples,
    NUM_INPUTS: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    at_samples = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inputs = tl.arange(0, BLOCK_INPUTS)
    is_input = inputs < NUM_INPUTS
    window = tl.program_id(1).to(tl.int64)
    high_ptr += window * num_rows * NUM_INPUTS
    low_ptr += window * num_rows * NUM_INPUTS
    rows = first_row + at_samples
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
    at = window * num_samples + at_samples
    tl.store(samples_ptr + at, samples, mask=at_samples < num_samples)


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
