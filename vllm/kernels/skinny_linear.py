"""Products of a decode step's rows, with what surrounds them: norm, gate, residual.

    embed_frames     frames -> the residual stream
    normed_linear    RMS norm of the residual stream, then a product: queries, keys, values; heads
    gated_linear     RMS norm, then silu(gate) * up
    residual_linear  a product, added to the residual stream
    skinny_linear    a product alone

On CUDA each is one launch of ``kernels.triton``, into memory of the caller: nothing is allocated and
nothing waits. Elsewhere torch computes the same, which is the definition of correct.

The norm is deferred. Whoever writes the residual stream writes it a second time, times the gain of
the norm that comes next, and the sums of its squares; whoever reads it multiplies that and divides
the product by the RMS. So a norm is neither a launch nor a pass of its own. Knows no layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm.kernels.dependent_launch import DependentLaunch
from vllm.kernels.linear_config import ROW_BUCKETS, SUM_WIDTH, LinearConfig, find_config
from vllm.kernels.quantize import QuantizedWeight

__all__ = [
    "LinearWorkspace",
    "ResidualRows",
    "embed_frames",
    "gated_linear",
    "normed_linear",
    "residual_linear",
    "skinny_linear",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class ResidualRows:
    """The residual stream of some rows, and what the norm that comes next needs of it."""

    hidden: Tensor  # [N, H]; H is a multiple of 64
    scaled: Tensor  # [N, H], hidden times the norm's gain; of the type that products are made in
    square_sums: Tensor  # float32 [H / 64, N], of 64 neighbours of hidden each

    @classmethod
    def allocate(
        cls,
        num_rows: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        product_dtype: torch.dtype | None = None,
    ) -> ResidualRows:
        """Memory with nothing in it.

        Args:
            num_rows: N.
            hidden_size: H, a multiple of 64.
            dtype: of the stream.
            device: where it lies.
            product_dtype: of inputs of products; ``dtype`` where it is None. float16 is cheaper
                than bfloat16 with weights of fp8.
        """
        assert hidden_size % SUM_WIDTH == 0, f"hidden size {hidden_size}: not a multiple of 64"
        shape = (num_rows, hidden_size)
        return cls(
            hidden=torch.empty(shape, dtype=dtype, device=device),
            scaled=torch.empty(shape, dtype=product_dtype or dtype, device=device),
            square_sums=torch.empty(hidden_size // SUM_WIDTH, num_rows, device=device),
        )

    def first(self, num_rows: int) -> ResidualRows:
        """The first rows, in the same memory."""
        sums = self.square_sums[:, :num_rows]
        return ResidualRows(self.hidden[:num_rows], self.scaled[:num_rows], sums)


class LinearWorkspace:
    """Memory that products share which follow each other on one stream, and how they are made.

    Args:
        shapes: outputs and inputs of the weights, gates and ups together.
        max_rows: of any product.
        dtype: of the inputs.
        device: where they are made.
        batch_invariant: a row's result has the same bits beside any other rows, so cuBLAS, whose
            kernel depends on their number, is not used.
        pdl: whether kernels start before the one ahead has ended (compute capability 9.0 and
            newer).
        arch: compute capability, 90 for 9.0; None asks the device, and is torch where that is no
            CUDA device.
    """

    def __init__(
        self,
        shapes: Iterable[tuple[int, int]],
        max_rows: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_invariant: bool = True,
        pdl: DependentLaunch = DependentLaunch.OFF,
        arch: int | None = None,
    ) -> None:
        if arch is None and device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            arch = 10 * major + minor
        is_able = arch is not None and arch >= 90
        assert is_able or not pdl.is_on, f"no dependent launch on sm_{arch}"
        self.arch = arch
        self.batch_invariant = batch_invariant
        self.pdl = pdl
        num_partials = num_tiles = num_products = 0
        if arch is not None:
            row_counts = {*(rows for rows in ROW_BUCKETS if rows < max_rows), max_rows}
            for num_outputs, num_inputs in set(shapes):
                num_products = max(num_products, max_rows * num_outputs)
                for num_rows in row_counts:
                    config = find_config(
                        arch, num_outputs, num_inputs, num_rows, input_bytes=dtype.itemsize
                    )
                    num_partials = max(num_partials, config.num_partials(num_rows, num_outputs))
                    row_tiles, output_tiles, _ = config.grid(num_rows, num_outputs)
                    num_tiles = max(num_tiles, row_tiles * output_tiles)
        # What the splits of a product leave for the last of them to add up.
        self.partials = torch.empty(num_partials, device=device)
        # How many splits of a tile have arrived; the last one sets it back.
        self.counters = torch.zeros(num_tiles, dtype=torch.int32, device=device)
        self._products = torch.empty(
            0 if batch_invariant else num_products, dtype=dtype, device=device
        )

    def config(
        self, x: Tensor, weight: Tensor | QuantizedWeight, *, is_gated: bool = False
    ) -> LinearConfig | None:
        """How the product of these is cut; None if torch computes it."""
        if self.arch is None:
            return None
        num_outputs, num_inputs = weight.shape
        return find_config(
            self.arch,
            num_outputs,
            num_inputs,
            len(x),
            input_bytes=x.itemsize,
            weight_bytes=_values_of(weight).itemsize,
            is_gated=is_gated,
        )

    def cublas_product(
        self, x: Tensor, weight: Tensor | QuantizedWeight, config: LinearConfig
    ) -> Tensor | None:
        """The plain product [N, M] by cuBLAS, where that is wanted and may be; else None."""
        if config.provider != "cublas" or self.batch_invariant or not isinstance(weight, Tensor):
            return None
        shape = (len(x), weight.shape[0])
        return torch.mm(x, weight.t(), out=self._products[: shape[0] * shape[1]].view(shape))


def skinny_linear(
    x: Tensor, weight: Tensor | QuantizedWeight, out: Tensor, workspace: LinearWorkspace
) -> None:
    """``out = x weight^T``.

    Args:
        x: [N, K], contiguous, as all tensors here.
        weight: [M, K] of the type of ``x``, or quantised by output to int8 or fp8.
        out: [N, M], of any floating type.
        workspace: of the stream.
    """
    _linear(x, weight, None, 0.0, out, workspace)


def normed_linear(
    rows: ResidualRows,
    eps: float,
    weight: Tensor | QuantizedWeight,
    out: Tensor,
    workspace: LinearWorkspace,
) -> None:
    """``out`` [N, M] = RMS norm of the rows, whose gain they hold already, times ``weight`` [M, H]."""
    _linear(rows.scaled, weight, rows.square_sums, eps, out, workspace)


def gated_linear(
    rows: ResidualRows,
    eps: float,
    weight: Tensor | QuantizedWeight,
    out: Tensor,
    workspace: LinearWorkspace,
) -> None:
    """``out`` [N, M / 2] = ``silu(gate) * up`` of the norm's product with ``weight`` [M, H].

    Gates are the first half of the outputs and ups the second.
    """
    x = rows.scaled
    config = workspace.config(x, weight, is_gated=True)
    _check(x, weight, out, num_outputs=2 * out.shape[1])
    if config is None:
        gate, up = _normed(_product(x, weight), rows.square_sums, eps).chunk(2, dim=-1)
        out.copy_(_rounded(F.silu(gate) * up, out.dtype))
        return
    from vllm.kernels.triton import skinny_linear as kernels

    product = workspace.cublas_product(x, weight, config)
    kernels.gated_linear(
        _operands(x, weight, product), rows.square_sums, eps, out, config, pdl=workspace.pdl
    )


def residual_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    next_gain: Tensor,
    rows: ResidualRows,
    workspace: LinearWorkspace,
) -> None:
    """Add ``x weight^T`` to the residual stream, and prepare its next norm.

    Args:
        x: [N, K].
        weight: [H, K].
        next_gain: [H], gain of the norm that reads the stream next.
        rows: changed in place.
        workspace: of the stream.
    """
    config = workspace.config(x, weight)
    _check(x, weight, rows.hidden, num_outputs=rows.hidden.shape[1])
    if config is None:
        _write_rows(_product(x, weight) + rows.hidden.float(), next_gain, rows)
        return
    from vllm.kernels.triton import skinny_linear as kernels

    product = workspace.cublas_product(x, weight, config)
    kernels.residual_linear(
        _operands(x, weight, product),
        next_gain,
        rows.hidden,
        rows.scaled,
        rows.square_sums,
        workspace.partials,
        workspace.counters,
        config if product is None else config.epilogue(),
        pdl=workspace.pdl,
    )


def embed_frames(
    frames: Tensor,
    frame_rows: Tensor,
    table: Tensor,
    next_gain: Tensor,
    rows: ResidualRows,
    workspace: LinearWorkspace,
) -> None:
    """Begin the residual stream with the sum of one row of the table per codebook.

    Args:
        frames: integers [max_num_rows, num_codebooks], the last frame of each stream.
        frame_rows: integers [N], which of them; a negative one is padding, and its row zeros.
        table: [num_codebooks * codebook_size, H]; code c of codebook k has row
            ``k * codebook_size + c``.
        next_gain: [H], gain of the first norm.
        rows: written.
        workspace: of the stream.
    """
    if workspace.arch is None:
        codebook_size = table.shape[0] // frames.shape[1]
        offsets = torch.arange(frames.shape[1], device=frames.device) * codebook_size
        total = table[frames[frame_rows] + offsets].float().sum(1)
        _write_rows(total * (frame_rows >= 0)[:, None], next_gain, rows)
        return
    from vllm.kernels.triton import embed_frames as kernels

    kernels.embed_frames(
        frames,
        frame_rows,
        table,
        next_gain,
        rows.hidden,
        rows.scaled,
        rows.square_sums,
        pdl=workspace.pdl.is_on,
    )


def _linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    square_sums: Tensor | None,
    eps: float,
    out: Tensor,
    workspace: LinearWorkspace,
) -> None:
    config = workspace.config(x, weight)
    _check(x, weight, out, num_outputs=out.shape[1])
    if config is None:
        product = _product(x, weight)
        out.copy_(product if square_sums is None else _normed(product, square_sums, eps))
        return
    from vllm.kernels.triton import skinny_linear as kernels

    finished = workspace.cublas_product(x, weight, config)
    kernels.linear(
        _operands(x, weight, finished),
        square_sums,
        eps,
        out,
        workspace.partials,
        workspace.counters,
        config if finished is None else config.epilogue(),
        pdl=workspace.pdl,
    )


def _check(x: Tensor, weight: Tensor | QuantizedWeight, out: Tensor, *, num_outputs: int) -> None:
    values = _values_of(weight)
    assert tuple(weight.shape) == (num_outputs, x.shape[1]), f"{weight.shape} for {x.shape}"
    assert len(out) == len(x)
    assert x.is_contiguous()
    assert values.is_contiguous()
    assert out.is_contiguous()
    assert x.dtype in _DTYPES
    assert isinstance(weight, QuantizedWeight) or weight.dtype == x.dtype
    assert values.numel() < 2**31, "places in a weight are 32-bit integers"


def _values_of(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight.values if isinstance(weight, QuantizedWeight) else weight


def _operands(
    x: Tensor, weight: Tensor | QuantizedWeight, product: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Operands of a kernel: rows, values and scales; or the finished product, and no weight."""
    if product is not None:
        return product, None, None
    if isinstance(weight, QuantizedWeight):
        return x, weight.values, weight.scales
    return x, weight, None


def _product(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """float32 [N, M]."""
    if isinstance(weight, QuantizedWeight):
        return F.linear(x.float(), weight.values.float()) * weight.scales
    return F.linear(x.float(), weight.float())


def _normed(product: Tensor, square_sums: Tensor, eps: float) -> Tensor:
    mean_square = square_sums.sum(0) / (len(square_sums) * SUM_WIDTH)
    return product * (mean_square + eps).rsqrt()[:, None]


def _write_rows(total: Tensor, next_gain: Tensor, rows: ResidualRows) -> None:
    hidden = _rounded(total, rows.hidden.dtype)
    rows.hidden.copy_(hidden)
    rows.scaled.copy_(_rounded(hidden.float() * next_gain.float(), rows.scaled.dtype))
    squares = hidden.float().square()
    rows.square_sums.copy_(squares.view(len(total), -1, SUM_WIDTH).sum(-1).t())


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` as ``dtype``; what float16 cannot hold becomes its largest number."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        values = values.clamp(-limit, limit)
    return values.to(dtype)
