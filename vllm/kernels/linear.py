"""Matrix products whose rows do not depend on how many rows there are.

A BLAS picks its kernel by shape, so the same row can differ in its last bits between one row and
five. Here the rows are padded with zeros to a multiple of a quantum at which the bits are equal,
which ``check_row_invariance`` verifies on the machine at hand; weights packed in oneDNN's blocked
order need far less padding than plain ones. Knows no layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm.logger import get_logger

__all__ = [
    "check_row_invariance",
    "linear",
    "pack_weight",
    "pad_rows",
    "row_quantum",
    "set_row_quantum",
]

logger = get_logger(__name__)

DEFAULT_ROW_QUANTUM = 4
_QUANTA = (1, 2, 4, 8, 16, 32, 64)
_CHECKED_ROWS = 64
# Rows that oneDNN plans the blocks for. Blocks made for one row take another path at one row,
# with other bits; those made for many are as fast there.
_PACKED_FOR_ROWS = 32

# Process-wide, because it is a property of the BLAS in this process.
_quantum = DEFAULT_ROW_QUANTUM


def row_quantum() -> int:
    """Rows are padded to a multiple of this; 1 means never."""
    return _quantum


def set_row_quantum(quantum: int) -> None:
    """Choose the quantum; 1 switches padding, and with it batch invariance, off."""
    global _quantum
    assert quantum >= 1
    _quantum = quantum


def pad_rows(x: Tensor) -> Tensor:
    """``x`` [N, H] with zero rows added up to a multiple of the quantum; itself if it fits."""
    missing = -x.shape[0] % _quantum
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def pack_weight(weight: Tensor) -> Tensor:
    """``weight`` [M, K] as ``linear`` multiplies it fastest on its device; maybe the same tensor.

    What comes back may be opaque: only its shape, type and device can be read.
    """
    can_pack = (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )
    if not can_pack:
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.detach().contiguous(), _PACKED_FOR_ROWS
    )
    return packed


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [N, K] times ``weight`` [M, K] transposed: [N, M], each row alone in its bits.

    ``weight`` is plain or as ``pack_weight`` gave it; the two differ in their last bits.
    """
    num_rows = x.shape[0]
    padded = pad_rows(x)
    y = _product(padded, weight)
    return y if padded is x else y[:num_rows]


def check_row_invariance(weights: Iterable[Tensor]) -> int:
    """Find and set the smallest quantum at which these weights treat rows alone.

    Weights must be in the form that they are used in. For each distinct shape, 1 to 64 rows at two offsets must equal, bit for bit, the same rows of
    a product of 128. Returns the quantum; warns when none suffices and keeps the largest.

    Args:
        weights: matrices [M, K] of the model; those of equal shape are tried once.
    """
    distinct = {(w.shape, w.dtype): w for w in weights}.values()
    for quantum in _QUANTA:
        set_row_quantum(quantum)
        if all(_rows_are_alone(weight) for weight in distinct):
            return quantum
    logger.warning("matrix products depend on the batch here; batch invariance is not exact")
    return _quantum


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if not weight.is_mkldnn:
        return F.linear(x, weight)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def _rows_are_alone(weight: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * _CHECKED_ROWS, weight.shape[1], generator=generator)
    x = x.to(weight.device, weight.dtype)
    whole = linear(x, weight)
    return all(
        torch.equal(linear(x[start : start + rows], weight), whole[start : start + rows])
        for rows in range(1, _CHECKED_ROWS + 1)
        for start in (0, 5)
    )
