"""Matrix products whose rows do not depend on how many rows there are.

A BLAS picks its kernel by shape, so the same row can differ in its last bits between one row and
five. Here the rows are padded with zeros to a multiple of a quantum at which the bits are equal,
which ``check_row_invariance`` verifies on the machine at hand. Knows no layer.
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
    "pad_rows",
    "row_quantum",
    "set_row_quantum",
]

logger = get_logger(__name__)

DEFAULT_ROW_QUANTUM = 4
_QUANTA = (4, 8, 16, 32, 64)
_CHECKED_ROWS = 64

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


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [N, K] times ``weight`` [M, K] transposed: [N, M], each row alone in its bits."""
    num_rows = x.shape[0]
    padded = pad_rows(x)
    y = F.linear(padded, weight)
    return y if padded is x else y[:num_rows]


def check_row_invariance(weights: Iterable[Tensor]) -> int:
    """Find and set the smallest quantum at which these weights treat rows alone.

    For each distinct shape, 1 to 64 rows at two offsets must equal, bit for bit, the same rows of
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
