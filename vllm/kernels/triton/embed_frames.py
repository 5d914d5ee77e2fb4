"""Sums of codebook rows as the beginning of the residual stream.

The form for CUDA of ``kernels.skinny_linear.embed_frames``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm.kernels.linear_config import SUM_WIDTH
from vllm.kernels.triton.skinny_linear import store_residual

__all__ = ["embed_frames", "embed_frames_kernel"]

_BLOCK_ROWS = 4
_NUM_WARPS = 2


def embed_frames(
    frames: Tensor,
    frame_rows: Tensor,
    table: Tensor,
    gain: Tensor,
    hidden: Tensor,
    scaled: Tensor,
    square_sums: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Arguments as of ``kernels.skinny_linear.embed_frames``; all but the sums contiguous."""
    num_rows, hidden_size = hidden.shape
    num_codebooks = frames.shape[1]
    embed_frames_kernel[(triton.cdiv(num_rows, _BLOCK_ROWS), hidden_size // SUM_WIDTH)](
        *(frames, frame_rows, table, gain, hidden, scaled, square_sums),
        square_sums.stride(0),
        num_rows,
        HIDDEN_SIZE=hidden_size,
        NUM_CODEBOOKS=num_codebooks,
        CODEBOOK_SIZE=len(table) // num_codebooks,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_OUTPUTS=SUM_WIDTH,
        PDL=pdl,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if pdl else {}),
    )


@triton.jit(
    do_not_specialize=["sums_stride", "num_rows"], do_not_specialize_on_alignment=["sums_ptr"]
)
def embed_frames_kernel(
    frames_ptr,  # integers [max_num_rows, NUM_CODEBOOKS]
    frame_rows_ptr,  # integers [N], negative for padding
    table_ptr,  # [NUM_CODEBOOKS * CODEBOOK_SIZE, HIDDEN_SIZE]
    gain_ptr,  # [HIDDEN_SIZE]
    hidden_ptr,  # [N, HIDDEN_SIZE]
    scaled_ptr,  # [N, HIDDEN_SIZE]
    sums_ptr,  # float32 [HIDDEN_SIZE / 64, N]
    sums_stride,
    num_rows,
    HIDDEN_SIZE: tl.constexpr,
    NUM_CODEBOOKS: tl.constexpr,
    CODEBOOK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gain = tl.load(gain_ptr + outputs).to(tl.float32)
    frame_rows = tl.load(frame_rows_ptr + rows, mask=rows < num_rows, other=-1).to(tl.int64)
    is_stream = frame_rows >= 0
    total = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), tl.float32)
    for codebook in tl.static_range(NUM_CODEBOOKS):
        at = frames_ptr + frame_rows * NUM_CODEBOOKS + codebook
        codes = tl.load(at, mask=is_stream, other=0).to(tl.int32)
        entries = table_ptr + (codebook * CODEBOOK_SIZE + codes) * HIDDEN_SIZE
        entry = tl.load(entries[None, :] + outputs[:, None], mask=is_stream[None, :], other=0.0)
        total += entry.to(tl.float32)
    store_residual(
        *(total, gain, hidden_ptr, scaled_ptr, sums_ptr, sums_stride),
        *(rows, outputs, num_rows),
        HIDDEN_SIZE,
    )
