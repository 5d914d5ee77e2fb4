"""Root-mean-square norm: native on float32 rows where the library is, else the reference.

The Python face of ``csrc/rms_norm.cc``; the smallest one, and the example of ``docs/kernels.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm.kernels import native, reference

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm of the rows of ``x`` [..., H], times ``weight`` [H]; a new tensor of the same type.

    Each row alone in its bits, whatever the number of rows or threads.
    """
    lib = native.loaded_library()
    is_native = (
        lib is not None
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and weight.is_contiguous()
    )
    if not is_native:
        return reference.rms_norm(x, weight, eps)
    assert lib is not None
    assert weight.shape == x.shape[-1:]
    rows = x.reshape(-1, x.shape[-1])
    stride = native.row_stride(rows)
    if stride is None:
        rows = rows.contiguous()
        stride = rows.shape[1]
    y = torch.empty(rows.shape)
    lib.hav_rms_norm(
        native.pool(),
        rows.data_ptr(),
        stride,
        weight.data_ptr(),
        eps,
        y.data_ptr(),
        y.stride(0),
        *rows.shape,
    )
    return y.view(x.shape)
