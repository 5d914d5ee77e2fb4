"""Sum over codebooks of one table row each: native on float32 tables, else with torch.

The Python face of ``csrc/embed_codes.cc``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm.kernels import native

__all__ = ["embed_codes"]


def embed_codes(codes: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
    """Embed delayed frames.

    Args:
        codes: int64 [N, num_codebooks].
        table: [num_codebooks * codebook_size, H]; code c of codebook k has row
            ``k * codebook_size + c``.
        offsets: int64 [num_codebooks], the rows of the codebooks' first codes.

    Returns:
        [N, H]; each row alone in its bits.
    """
    lib = native.loaded_library()
    stride = native.row_stride(codes)
    is_native = (
        lib is not None
        and stride is not None
        and table.dtype == torch.float32
        and table.device.type == "cpu"
        and table.is_contiguous()
    )
    if not is_native:
        return F.embedding(codes + offsets, table).sum(dim=1)
    assert lib is not None
    num_rows, num_codebooks = codes.shape
    width = table.shape[1]
    y = torch.empty(num_rows, width)
    lib.hav_embed_codes(
        native.pool(),
        table.data_ptr(),
        width,
        codes.data_ptr(),
        stride,
        num_codebooks,
        table.shape[0] // num_codebooks,
        y.data_ptr(),
        width,
        num_rows,
    )
    return y
