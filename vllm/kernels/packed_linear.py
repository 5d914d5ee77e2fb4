"""Products with matrices that the native library has packed; the Python face of ``csrc/linear.cc``.

Every row's result is its own, to the bit, by the order of its sums: no padding is needed. Knows
no layer. Where there is no library, ``kernels.linear`` and ``kernels.quantize`` compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm.kernels import native
from vllm.kernels.quantize import QuantizedWeight, WeightFormat

__all__ = ["PACKED_FORMATS", "InputNorm", "PackedMatrix"]

# In the order of the native library.
PACKED_FORMATS = (
    WeightFormat.FLOAT32,
    WeightFormat.BFLOAT16,
    WeightFormat.INT8,
    WeightFormat.INT4,
)

_FORMAT_OF_DTYPE = {
    torch.float32: WeightFormat.FLOAT32,
    torch.bfloat16: WeightFormat.BFLOAT16,
}


@dataclass(frozen=True, eq=False)
class InputNorm:
    """An RMS norm that rows go through before a product."""

    weight: Tensor  # float32 [num_inputs]
    eps: float


class PackedMatrix:
    """A copy of a matrix in the panels of the instruction set in use.

    Args:
        weight: [num_outputs, num_inputs], float32 or bfloat16, or quantised.
        is_gated: the first half of the outputs are gates and the second half ups, and
            ``silu(gate) * up`` comes out.

    Raises:
        MemoryError: there is no memory for the copy.
    """

    def __init__(self, weight: Tensor | QuantizedWeight, *, is_gated: bool = False) -> None:
        lib = native.loaded_library()
        assert lib is not None, "ask native.loaded_library() first"
        num_outputs, self.num_inputs = weight.shape
        self.num_outputs = num_outputs // 2 if is_gated else num_outputs
        if isinstance(weight, QuantizedWeight):
            self.format = weight.format
            values, scales = weight.values.contiguous(), weight.scales.contiguous()
        else:
            self.format = _FORMAT_OF_DTYPE[weight.dtype]
            values, scales = weight.detach().contiguous(), None
        self._lib = lib
        self.handle: int | None = lib.hav_linear_create(
            native.pool(),
            PACKED_FORMATS.index(self.format),
            num_outputs,
            self.num_inputs,
            values.data_ptr(),
            values.stride(0) * values.element_size(),
            None if scales is None else scales.data_ptr(),
            is_gated,
        )
        if self.handle is None:
            raise MemoryError(f"no memory to pack a matrix of {num_outputs} x {self.num_inputs}")

    def __del__(self) -> None:
        if getattr(self, "handle", None) is not None:
            self._lib.hav_linear_destroy(self.handle)

    @property
    def num_bytes(self) -> int:
        """What one product reads of it."""
        return int(self._lib.hav_linear_num_bytes(self.handle))

    def __call__(
        self, x: Tensor, *, norm: InputNorm | None = None, add_to: Tensor | None = None
    ) -> Tensor:
        """Rows ``x`` [N, num_inputs] times the matrix transposed: float32 [N, num_outputs].

        Args:
            x: on the CPU; of another type than float32, it is converted.
            norm: rows go through it first.
            add_to: float32 [N, num_outputs] with contiguous rows, changed in place and returned.
        """
        x = x.float()
        stride = native.row_stride(x)
        if stride is None:
            x = x.contiguous()
            stride = x.stride(0)
        num_rows = x.shape[0]
        assert x.shape == (num_rows, self.num_inputs)
        y = torch.empty(num_rows, self.num_outputs) if add_to is None else add_to
        y_stride = native.row_stride(y)
        assert y_stride is not None
        assert y.shape == (num_rows, self.num_outputs)
        status = self._lib.hav_linear_apply(
            native.pool(),
            self.handle,
            x.data_ptr(),
            stride,
            num_rows,
            None if norm is None else norm.weight.data_ptr(),
            0.0 if norm is None else norm.eps,
            y.data_ptr(),
            y_stride,
            add_to is not None,
        )
        if status != 0:
            raise MemoryError(f"no memory for a product of {num_rows} rows")
        return y
