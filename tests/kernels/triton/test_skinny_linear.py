"""Products of few rows in Triton against torch, and what the compiler makes of those of 3B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm.kernels import linear_config, skinny_linear
from vllm.kernels.dependent_launch import DependentLaunch
from vllm.kernels.linear_config import LinearConfig, find_config
from vllm.kernels.quantize import QuantizedWeight, WeightFormat, quantize
from vllm.kernels.skinny_linear import LinearWorkspace, ResidualRows
from vllm.kernels.triton.offline import ARCHITECTURES, Compiled

EPS = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Types of inputs with formats of weights; what is slow to interpret needs no more than one of each.
KINDS = [
    (torch.float32, None),
    (torch.float16, None),
    (torch.bfloat16, None),
    (torch.bfloat16, WeightFormat.INT8),
    (torch.float16, WeightFormat.FP8),
]
HIDDEN = 128
# The cut of a product that is measured in thousands, for one that is not.
SMALL = LinearConfig(
    provider="triton",
    block_rows=16,
    block_outputs=64,
    block_inputs=32,
    split_inputs=64,
    num_splits=0,
    is_sequential=False,
    num_warps=4,
    num_stages=2,
    is_measured=False,
)


class Fixed:
    """Stands in for ``find_config``: small blocks, so that little work takes every path."""

    def __init__(self, **changes: Any) -> None:
        self._config = replace(SMALL, **changes)

    def __call__(self, arch: int, num_outputs: int, num_inputs: int, *_: Any, **options: Any):
        split_inputs = num_inputs if options.get("is_gated") else self._config.split_inputs
        num_splits = -(-num_inputs // split_inputs)
        return replace(self._config, split_inputs=split_inputs, num_splits=num_splits)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says how products are cut from here on."""

    def use(**changes: Any) -> None:
        monkeypatch.setattr(skinny_linear, "find_config", Fixed(**changes))

    use()
    return use


def workspaces(
    device: torch.device, dtype: torch.dtype, shapes: list[tuple[int, int]], **options: Any
) -> tuple[LinearWorkspace, LinearWorkspace]:
    """For Triton, here or interpreted, and for torch."""
    on_device = LinearWorkspace(shapes, 64, dtype=dtype, device=device, arch=90, **options)
    on_device.partials.fill_(float("nan"))
    return on_device, LinearWorkspace([], 64, dtype=dtype, device=torch.device("cpu"))


def make_weight(
    num_outputs: int, num_inputs: int, dtype: torch.dtype, weight_format: WeightFormat | None
) -> Tensor | QuantizedWeight:
    weight = torch.randn(num_outputs, num_inputs) / num_inputs**0.5
    return weight.to(dtype) if weight_format is None else quantize(weight, weight_format)


def to(weight: Tensor | QuantizedWeight, device: torch.device) -> Tensor | QuantizedWeight:
    if isinstance(weight, Tensor):
        return weight.to(device)
    return replace(weight, values=weight.values.to(device), scales=weight.scales.to(device))


def make_rows(num_rows: int, dtype: torch.dtype, hidden_size: int = HIDDEN) -> ResidualRows:
    hidden = torch.randn(num_rows, hidden_size).to(dtype)
    scaled = (hidden.float() * (torch.rand(hidden_size) + 0.5)).to(dtype)
    squares = hidden.float().square().view(num_rows, -1, 64)
    return ResidualRows(hidden, scaled, squares.sum(-1).t().contiguous())


def rows_to(rows: ResidualRows, device: torch.device) -> ResidualRows:
    """A copy in memory with room for more rows, so that strides are not what shapes say."""
    num_rows, hidden_size = rows.hidden.shape
    room = ResidualRows.allocate(
        num_rows + 3, hidden_size, rows.hidden.dtype, device, rows.scaled.dtype
    )
    copy = room.first(num_rows)
    for target, source in zip(tensors(copy), tensors(rows), strict=True):
        target.copy_(source)
    return copy


def tensors(rows: ResidualRows) -> tuple[Tensor, Tensor, Tensor]:
    return rows.hidden, rows.scaled, rows.square_sums


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == expected.dtype
    actual, expected = actual.cpu().float(), expected.float()
    error = (actual - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype], error
    assert (actual - expected).abs().max() < 8 * TOLERANCE[dtype] * expected.abs().max()


def assert_same_rows(actual: ResidualRows, expected: ResidualRows, dtype: torch.dtype) -> None:
    for one, other in zip(tensors(actual), tensors(expected), strict=True):
        assert_near(one, other, dtype)


@pytest.mark.parametrize(("dtype", "weight_format"), KINDS)
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "num_inputs", "block_rows", "is_sequential"),
    [(1, 64, 64, 16, False), (19, 100, 208, 16, False), (40, 130, 100, 32, True)],
)
def test_linear_equals_torch(
    device, cut, dtype, weight_format, num_rows, num_outputs, num_inputs, block_rows, is_sequential
):
    cut(block_rows=block_rows, is_sequential=is_sequential)
    check_linear(device, dtype, weight_format, num_rows, num_outputs, num_inputs)


@settings(
    deadline=None,
    max_examples=5,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    num_rows=st.integers(1, 20),
    num_outputs=st.integers(1, 80),
    num_inputs=st.integers(1, 150),
    is_sequential=st.booleans(),
)
def test_linear_takes_any_shape(device, cut, num_rows, num_outputs, num_inputs, is_sequential):
    cut(is_sequential=is_sequential)
    check_linear(device, torch.float32, None, num_rows, num_outputs, num_inputs)


def check_linear(
    device: torch.device,
    dtype: torch.dtype,
    weight_format: WeightFormat | None,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
) -> None:
    weight = make_weight(num_outputs, num_inputs, dtype, weight_format)
    x = torch.randn(num_rows, num_inputs).to(dtype)
    ours, theirs = workspaces(device, dtype, [(num_outputs, num_inputs)])
    actual = torch.full((num_rows, num_outputs), float("nan"), dtype=dtype, device=device)
    expected = torch.empty(num_rows, num_outputs, dtype=dtype)

    skinny_linear.skinny_linear(x.to(device), to(weight, device), actual, ours)

    skinny_linear.skinny_linear(x, weight, expected, theirs)
    assert_near(actual, expected, dtype)
    assert not ours.counters.any()


@pytest.mark.parametrize(("dtype", "weight_format"), KINDS)
def test_normed_linear_equals_torch(device, cut, dtype, weight_format):
    weight = make_weight(100, HIDDEN, dtype, weight_format)
    rows = make_rows(19, dtype)
    ours, theirs = workspaces(device, dtype, [(100, HIDDEN)])
    actual = torch.full((19, 100), float("nan"), device=device)
    expected = torch.empty(19, 100)

    on_device = rows_to(rows, device)
    skinny_linear.normed_linear(on_device, EPS, to(weight, device), actual, ours)

    skinny_linear.normed_linear(rows, EPS, weight, expected, theirs)
    assert_near(actual, expected, dtype)


@pytest.mark.parametrize(("dtype", "weight_format"), KINDS)
def test_gated_linear_equals_torch(device, cut, dtype, weight_format):
    weight = make_weight(2 * 100, HIDDEN, dtype, weight_format)
    rows = make_rows(19, dtype)
    ours, theirs = workspaces(device, dtype, [(2 * 100, HIDDEN)])
    actual = torch.full((19, 100), float("nan"), dtype=dtype, device=device)
    expected = torch.empty(19, 100, dtype=dtype)

    on_device = rows_to(rows, device)
    skinny_linear.gated_linear(on_device, EPS, to(weight, device), actual, ours)

    skinny_linear.gated_linear(rows, EPS, weight, expected, theirs)
    assert_near(actual, expected, dtype)


@pytest.mark.parametrize(
    ("dtype", "weight_format", "is_sequential"),
    [*((*kind, False) for kind in KINDS), (torch.float32, None, True)],
)
def test_residual_linear_equals_torch(device, cut, grid_order, dtype, weight_format, is_sequential):
    cut(is_sequential=is_sequential)
    weight = make_weight(HIDDEN, 200, dtype, weight_format)
    x, rows = torch.randn(19, 200).to(dtype), make_rows(19, dtype)
    gain = torch.rand(HIDDEN).to(dtype)
    ours, theirs = workspaces(device, dtype, [(HIDDEN, 200)])
    actual = rows_to(rows, device)

    for _ in range(2):
        operands = (x.to(device), to(weight, device), gain.to(device))
        skinny_linear.residual_linear(*operands, actual, ours)
        skinny_linear.residual_linear(x, weight, gain, rows, theirs)

    assert_same_rows(actual, rows, dtype)
    assert not ours.counters.any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_rows", "num_codebooks"), [(1, 3), (9, 2)])
def test_embed_frames_equals_torch(device, dtype, num_rows, num_codebooks):
    frames = torch.randint(0, 11, (12, num_codebooks))
    frame_rows = torch.randint(-1, 12, (num_rows,), dtype=torch.int32)
    table, gain = torch.randn(11 * num_codebooks, HIDDEN).to(dtype), torch.rand(HIDDEN).to(dtype)
    ours, theirs = workspaces(device, dtype, [])
    expected = make_rows(num_rows, dtype)
    actual = rows_to(expected, device)

    operands = (frames, frame_rows, table, gain)
    skinny_linear.embed_frames(*(each.to(device) for each in operands), actual, ours)

    skinny_linear.embed_frames(*operands, expected, theirs)
    assert torch.equal(actual.hidden.cpu(), expected.hidden)
    assert not actual.hidden[(frame_rows < 0).to(device)].any()
    torch.testing.assert_close(actual.scaled.cpu(), expected.scaled)
    torch.testing.assert_close(actual.square_sums.cpu(), expected.square_sums)


def test_a_mixed_step_writes_inputs_of_products_in_float16(device, cut):
    """With fp8 weights the stream stays bfloat16, and what cannot be float16 is cut off."""
    gain = torch.full((HIDDEN,), 100.0, dtype=torch.bfloat16)
    x = torch.randn(3, HIDDEN, dtype=torch.float16)
    x[0, 0] = 60000
    weight = make_weight(HIDDEN, HIDDEN, torch.float16, WeightFormat.FP8)
    ours, theirs = workspaces(device, torch.float16, [(HIDDEN, HIDDEN)])
    rows = make_rows(3, torch.bfloat16)
    rows = replace(rows, scaled=rows.scaled.half())
    actual = rows_to(rows, device)

    skinny_linear.residual_linear(x.to(device), to(weight, device), gain.to(device), actual, ours)

    skinny_linear.residual_linear(x, weight, gain, rows, theirs)
    assert actual.scaled.dtype == torch.float16
    assert actual.scaled.abs().max() == 65504
    assert_same_rows(actual, rows, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_beside_any_others(device, cut, dtype):
    """Tiles of 16 and 32 rows, splits side by side and one after another, a row at any place."""
    weight = make_weight(HIDDEN, 200, dtype, None).to(device)
    x, rows = torch.randn(40, 200).to(dtype).to(device), make_rows(40, dtype)
    if device.type == "cpu":
        # NumPy's products, which the interpreter takes, depend on the shape; whole numbers have no order.
        weight, x = (weight * 40).round(), x.round()
    gain = torch.rand(HIDDEN).to(dtype).to(device)
    results = []
    for block_rows, is_sequential, part in [
        (16, False, slice(0, 40)),
        (32, True, slice(0, 40)),
        (32, False, slice(5, 6)),
        (16, True, slice(5, 23)),
    ]:
        cut(block_rows=block_rows, is_sequential=is_sequential)
        ours, _ = workspaces(device, dtype, [(HIDDEN, 200)])
        all_rows = rows_to(rows, device)
        mine = rows_to(
            ResidualRows(
                all_rows.hidden[part], all_rows.scaled[part], all_rows.square_sums[:, part]
            ),
            device,
        )
        skinny_linear.residual_linear(x[part].contiguous(), weight, gain, mine, ours)
        results.append((part, mine))
    _, whole = results[0]
    for part, mine in results[1:]:
        assert torch.equal(mine.hidden, whole.hidden[part])
        assert torch.equal(mine.scaled, whole.scaled[part])
        assert torch.equal(mine.square_sums, whole.square_sums[:, part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_the_library_get_the_same_epilogues(device, cut, dtype):
    cut(provider="cublas")
    shapes = [(200, HIDDEN), (HIDDEN, 96)]
    ours, theirs = workspaces(device, dtype, shapes, batch_invariant=False)
    rows, gain = make_rows(5, dtype), torch.rand(HIDDEN).to(dtype)
    wide, narrow = (make_weight(*shape, dtype, None) for shape in shapes)
    x = torch.randn(5, 96).to(dtype)
    actual_rows = rows_to(rows, device)
    found = []
    for each_rows, space in ((actual_rows, ours), (rows, theirs)):
        place = each_rows.hidden.device
        normed = torch.empty(5, 200, dtype=dtype, device=place)
        skinny_linear.normed_linear(each_rows, EPS, wide.to(place), normed, space)
        gated = torch.empty(5, 100, dtype=dtype, device=place)
        skinny_linear.gated_linear(each_rows, EPS, wide.to(place), gated, space)
        operands = (x.to(place), narrow.to(place), gain.to(place))
        skinny_linear.residual_linear(*operands, each_rows, space)
        found.append((normed, gated))
    for actual, expected in zip(*found, strict=True):
        assert_near(actual, expected, dtype)
    assert_same_rows(actual_rows, rows, dtype)


# Products of Higgs Audio v2 3B: kernel, outputs, inputs.
PRODUCTS = {
    "qkv": ("linear", 5120, 3072),
    "output": ("residual", 3072, 3072),
    "gate_up": ("gated", 16384, 3072),
    "down": ("residual", 3072, 8192),
    "head": ("linear", 8208, 3072),
}
_KERNELS = "vllm.kernels.triton.skinny_linear"
_TRITON_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
}


def compile_product(
    compile_offline: Callable[..., Compiled],
    arch: int,
    product: str,
    num_rows: int,
    x: torch.dtype = torch.bfloat16,
    weight: torch.dtype | None = None,
    *,
    pdl: DependentLaunch = DependentLaunch.OFF,
) -> Compiled:
    kind, num_outputs, num_inputs = PRODUCTS[product]
    weight = weight or x
    config = find_config(
        arch,
        num_outputs,
        num_inputs,
        num_rows,
        input_bytes=x.itemsize,
        weight_bytes=weight.itemsize,
        is_gated=kind == "gated",
    )
    signature = {
        "x_ptr": _TRITON_TYPES[x],
        "weight_ptr": _TRITON_TYPES[weight],
        "sums_ptr": "*fp32",
        "sums_stride": "i32",
        "num_rows": "i32",
    }
    constants: dict[str, object] = {
        "NUM_OUTPUTS": num_outputs // 2 if kind == "gated" else num_outputs,
        "NUM_INPUTS": num_inputs,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_OUTPUTS": config.block_outputs,
        "BLOCK_INPUTS": config.block_inputs,
        "PDL": pdl.is_on,
        "PREFETCHES": pdl.prefetches,
    }
    if weight == x:
        constants["scales_ptr"] = None
    else:
        signature["scales_ptr"] = "*fp32"
    if kind != "gated":
        signature |= {"partials_ptr": "*fp32", "counters_ptr": "*i32"}
        constants["SPLIT_INPUTS"] = config.split_inputs
        constants["IS_SEQUENTIAL"] = config.is_sequential
    if kind == "residual":
        signature |= dict.fromkeys(("gain_ptr", "hidden_ptr"), "*bf16")
        signature["scaled_ptr"] = _TRITON_TYPES[x]
    else:
        signature |= {"eps": "fp32", "out_ptr": _TRITON_TYPES[x]}
        constants["NUM_SUMS"] = num_inputs // 64
    name = "linear_kernel" if kind == "linear" else f"{kind}_linear_kernel"
    return compile_offline(
        f"{_KERNELS}:{name}",
        signature,
        constants,
        arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=pdl.is_on,
    )


def wanted(arch: int, num_rows: int) -> tuple[str, str]:
    """Instructions of a good main loop: loads that are pipelined, products on tensor cores.

    Those of Hopper are as wide as the tile of rows, of which two groups of warps take half each.
    """
    width = min(linear_config.row_bucket(num_rows), 64)
    return ("LDGSTS", f"HGMMA.64x{width}x16" if arch >= 90 else "HMMA.16816")


_QUICK = (90, "gate_up", 1)  # the one that every test run compiles; --slow compiles all
_ALL = [
    pytest.param(
        arch, product, rows, marks=[] if (arch, product, rows) == _QUICK else pytest.mark.slow
    )
    for arch in ARCHITECTURES
    for product in PRODUCTS
    for rows in (1, 32, 64, 128, 256)
]


@pytest.mark.parametrize(("arch", "product", "num_rows"), _ALL)
def test_compiles_to_a_good_loop(compile_offline, arch, product, num_rows):
    compiled = compile_product(compile_offline, arch, product, num_rows)
    assert compiled.faults(contains=wanted(arch, num_rows)) == []


@pytest.mark.parametrize(
    ("arch", "x", "weight"),
    [
        (90, torch.float16, torch.float8_e4m3fn),
        (80, torch.bfloat16, torch.int8),
        pytest.param(90, torch.bfloat16, torch.float8_e4m3fn, marks=pytest.mark.slow),
        pytest.param(89, torch.float16, torch.float8_e4m3fn, marks=pytest.mark.slow),
        pytest.param(90, torch.bfloat16, torch.int8, marks=pytest.mark.slow),
        pytest.param(80, torch.float16, torch.int8, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "num_rows",
    [1, pytest.param(64, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow)],
)
def test_quantised_weights_compile_to_a_good_loop(compile_offline, arch, x, weight, num_rows):
    compiled = compile_product(compile_offline, arch, "gate_up", num_rows, x, weight)
    assert compiled.faults(contains=wanted(arch, num_rows)) == []


@pytest.mark.parametrize(
    ("product", "pdl"),
    [
        ("output", DependentLaunch.PREFETCH),
        pytest.param("output", DependentLaunch.ON, marks=pytest.mark.slow),
        ("gate_up", DependentLaunch.ON),
        pytest.param("gate_up", DependentLaunch.PREFETCH, marks=pytest.mark.slow),
        pytest.param("qkv", DependentLaunch.PREFETCH, marks=pytest.mark.slow),
        pytest.param("head", DependentLaunch.PREFETCH, marks=pytest.mark.slow),
    ],
)
def test_dependent_launch_fetches_waits_and_releases(compile_offline, product, pdl):
    compiled = compile_product(compile_offline, 90, product, 1, pdl=pdl)
    assert compiled.faults(contains=wanted(90, 1)) == []
    assert compiled.waits_first()
    order = ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    fetch = "prefetch.global.L2"
    assert (fetch in compiled.ptx) == pdl.prefetches
    if pdl.prefetches:
        order.insert(0, fetch)
    places = [compiled.ptx.index(each) for each in order]
    assert places == sorted(places)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("product", ["output", "gate_up"])
def test_float32_compiles(compile_offline, arch, product):
    compiled = compile_product(compile_offline, arch, product, 1, torch.float32)
    assert compiled.faults(contains=("LDGSTS", "FFMA")) == []
    assert not compiled.count("HMMA")


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_embedding_compiles(compile_offline, arch):
    compiled = compile_offline(
        "vllm.kernels.triton.embed_frames:embed_frames_kernel",
        {
            "frames_ptr": "*i64",
            "frame_rows_ptr": "*i64",
            **dict.fromkeys(("table_ptr", "gain_ptr", "hidden_ptr", "scaled_ptr"), "*bf16"),
            "sums_ptr": "*fp32",
            "sums_stride": "i32",
            "num_rows": "i32",
        },
        {
            "HIDDEN_SIZE": 3072,
            "NUM_CODEBOOKS": 8,
            "CODEBOOK_SIZE": 1026,
            "BLOCK_ROWS": 4,
            "BLOCK_OUTPUTS": 64,
            "PDL": arch >= 90,
        },
        arch,
        num_warps=2,
        launch_pdl=arch >= 90,
    )
    assert compiled.faults(contains=("LDG.E.64", "STG.E")) == []
    if arch >= 90:
        assert compiled.waits_first()
        assert "griddepcontrol.launch_dependents" in compiled.ptx
