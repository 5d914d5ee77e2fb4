"""Matrix products whose rows do not depend on how many rows there are.

A BLAS picks its kernel by shape, so the same row can differ in its last bits between one row and
five. Here the rows are padded with zeros to a multiple of a quantum at which the bits are equal,
which ``find_row_quantum`` finds for given weights on the machine at hand; weights packed in oneDNN's
blocked order need far less padding than plain ones. Knows no layer and keeps no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm.logger import get_logger

__all__ = ["DEFAULT_ROW_QUANTUM", "find_row_quantum", "linear", "pack_weight", "pad_rows"]

logger = get_logger(__name__)

DEFAULT_ROW_QUANTUM = 4
_QUANTA = (1, 2, 4, 8, 16, 32, 64)
_MAX_ROWS = 64  # the largest decode batch that is tried
# Row counts at which libraries change kernels: a single row is a matrix-vector product, and few
# rows are blocked in another way than many.
_FEW_ROWS = (1, 2, 3, 4, 8, 16)
_SLICE_WIDTH = 128  # outputs; several blocks of any kernel
# Rows that oneDNN plans the blocks for. Blocks made for one row take another path at one row,
# with other bits; those made for many are as fast there.
_PACKED_FOR_ROWS = 32


def pad_rows(x: Tensor, quantum: int) -> Tensor:
    """``x`` [N, H] with zero rows added up to a multiple of ``quantum``; itself if it fits."""
    missing = -x.shape[0] % quantum
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def pack_weight(weight: Tensor) -> Tensor:
    """``weight`` [M, K] as ``linear`` multiplies it fastest on its device; maybe the same tensor.

    On CUDA its rows lie one after the other, as the kernels of ``skinny_linear`` read them. What
    comes back may be opaque: only its shape, type and device can be read.
    """
    can_pack = (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )
    if not can_pack:
        return weight.contiguous() if weight.device.type == "cuda" else weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.detach().contiguous(), _PACKED_FOR_ROWS
    )
    return packed


def linear(x: Tensor, weight: Tensor, quantum: int = DEFAULT_ROW_QUANTUM) -> Tensor:
    """``x`` [N, K] times ``weight`` [M, K] transposed: [N, M], each row alone in its bits.

    Args:
        x: rows.
        weight: plain or as ``pack_weight`` gave it; the two differ in their last bits.
        quantum: the product runs on a multiple of so many rows, see ``find_row_quantum``; 1 switches
            padding, and with it batch invariance, off.
    """
    num_rows = x.shape[0]
    padded = pad_rows(x, quantum)
    y = _product(padded, weight)
    return y if padded is x else y[:num_rows]


def find_row_quantum(weights: Iterable[Tensor]) -> int:
    """The smallest quantum at which products with these weights treat rows alone.

    The bits of a row depend on the order in which the kernel that a library takes adds up, and
    values play no part in that. Two things are tried, each as cheaply as it can be:

    - every shape as it is, at the few row counts at which libraries change kernels;
    - every inner width and type at all row counts up to 64 and at two places in the batch, on a
      slice of the outputs, which are sums of their own.

    Weights must be in the form that they are used in. Warns when no quantum suffices, and returns
    the largest.

    Args:
        weights: matrices [M, K] of a model; equal shapes are tried once.
    """
    shapes = {(w.shape, w.dtype, w.is_mkldnn): w for w in weights}.values()
    slices = {(w.shape[1], w.dtype, w.is_mkldnn): _slice_like(w) for w in shapes}.values()
    for quantum in _QUANTA:
        all_rows = range(quantum, _MAX_ROWS + 1, quantum)
        few_rows = sorted({-(-rows // quantum) * quantum for rows in _FEW_ROWS})
        if all(_rows_are_alone(each, few_rows, starts=(0,)) for each in shapes) and all(
            _rows_are_alone(each, all_rows, starts=(0, 5)) for each in slices
        ):
            return quantum
    logger.warning("matrix products depend on the batch here; batch invariance is not exact")
    return _QUANTA[-1]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if not weight.is_mkldnn:
        return F.linear(x, weight)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def _slice_like(weight: Tensor) -> Tensor:
    """A narrow matrix of the inner width and form of ``weight``, with rows that add up to nothing.

    Its products with the rows that are tried are rounding errors alone, so that another order of
    addition shows even where results are rounded to eight bits.
    """
    width, inner = min(_SLICE_WIDTH, weight.shape[0]), weight.shape[1]
    columns = _with_twins(torch.randn(inner, width, generator=_generator()), dim=0, sign=-1.0)
    matrix = columns.to(weight.device, weight.dtype).t()
    if weight.is_mkldnn:
        return pack_weight(matrix)
    return matrix if weight.stride(0) == 1 else matrix.contiguous()


def _rows_are_alone(weight: Tensor, row_counts: Sequence[int], *, starts: Sequence[int]) -> bool:
    """Whether products of so many rows equal, bit for bit, those rows of one twice as large."""
    num_rows = 2 * max(row_counts)
    x = torch.randn(num_rows, weight.shape[1], generator=_generator())
    x = _with_twins(x, dim=1, sign=1.0).to(weight.device, weight.dtype)
    whole = _product(x, weight)
    return all(
        torch.equal(_product(x[start : start + rows], weight), whole[start : start + rows])
        for rows in row_counts
        for start in starts
    )


def _with_twins(values: Tensor, *, dim: int, sign: float) -> Tensor:
    """``values`` whose second half along ``dim`` repeats the first in another order."""
    half = values.shape[dim] // 2
    order = torch.randperm(half, generator=_generator())
    first = values.narrow(dim, 0, half)
    rest = torch.zeros_like(values.narrow(dim, 2 * half, values.shape[dim] - 2 * half))
    return torch.cat([first, sign * first.index_select(dim, order), rest], dim)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
