"""Gate of a feed-forward block, ``silu(gate) * up``: native on float32 rows, else the reference.

The Python face of ``csrc/silu_mul.cc``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm.kernels import native, reference

__all__ = ["silu_mul"]


def silu_mul(gate_up: Tensor) -> Tensor:
    """Gate and up side by side, [N, 2 * F] -> [N, F]; each row alone in its bits."""
    lib = native.library()
    stride = native.row_stride(gate_up)
    is_native = (
        lib is not None
        and stride is not None
        and gate_up.dtype == torch.float32
        and gate_up.device.type == "cpu"
    )
    if not is_native:
        return reference.silu_mul(gate_up)
    assert lib is not None
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(num_rows, width)
    lib.hav_silu_mul(
        native.pool(), gate_up.data_ptr(), stride, y.data_ptr(), width, num_rows, width
    )
    return y
