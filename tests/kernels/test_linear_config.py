"""The table of configurations and the rule beside it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.kernels import linear_config
from vllm.kernels.linear_config import ROW_BUCKETS, find_config

ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]
# Of Higgs Audio v2 3B: outputs, inputs, whether half of the outputs are gates.
SHAPES = {
    (5120, 3072): False,
    (3072, 3072): False,
    (16384, 3072): True,
    (3072, 8192): False,
    (8208, 3072): False,
}


@given(
    arch=st.sampled_from(ARCHITECTURES),
    num_outputs=st.integers(1, 20000),
    num_inputs=st.integers(1, 20000),
    input_bytes=st.sampled_from([2, 4]),
    is_gated=st.booleans(),
)
def test_rows_change_no_order_of_sums(
    arch: int, num_outputs: int, num_inputs: int, input_bytes: int, is_gated: bool
) -> None:
    configs = [
        find_config(arch, num_outputs, num_inputs, rows, input_bytes=input_bytes, is_gated=is_gated)
        for rows in ROW_BUCKETS
    ]
    assert len({(each.block_inputs, each.split_inputs) for each in configs}) == 1
    for rows, config in zip(ROW_BUCKETS, configs, strict=True):
        assert config.split_inputs % config.block_inputs == 0
        assert (config.num_splits - 1) * config.split_inputs < num_inputs
        assert num_inputs <= config.num_splits * config.split_inputs
        assert config.num_splits == 1 or not is_gated
        row_tiles, output_tiles, _ = config.grid(rows, num_outputs)
        assert row_tiles * config.block_rows >= rows
        assert output_tiles * config.block_outputs >= num_outputs


@pytest.mark.parametrize(("shape", "is_gated"), SHAPES.items())
@pytest.mark.parametrize("rows", ROW_BUCKETS)
def test_the_published_model_is_in_the_table_unmeasured(
    shape: tuple[int, int], is_gated: bool, rows: int
) -> None:
    config = find_config(90, *shape, rows, is_gated=is_gated)
    assert config.provider == "triton"
    assert not config.is_measured
    # A card of compute capability 9.0 holds this many tiles at once.
    row_tiles, output_tiles, splits = config.grid(rows, shape[0] // 2 if is_gated else shape[0])
    assert row_tiles * output_tiles * splits >= 96


def test_what_was_measured_replaces_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"32": {"provider": "cublas", "num_stages": 2, "triton_us": 9.0, "cublas_us": 8.5}}
    table = {"sm_90": {"640x512": {"block_inputs": 64, "num_splits": 2, "rows": rows}}}
    monkeypatch.setattr(linear_config, "_table", lambda: table)
    find_config.cache_clear()
    try:
        measured, planned = (find_config(90, 640, 512, rows) for rows in (20, 16))
    finally:
        find_config.cache_clear()
    assert (measured.provider, measured.num_stages, measured.is_measured) == ("cublas", 2, True)
    assert (planned.provider, planned.is_measured) == ("triton", False)
    assert (measured.num_splits, measured.split_inputs) == (2, 256)
    assert measured.block_inputs == planned.block_inputs == 64


def test_partial_sums_are_those_of_splits_side_by_side() -> None:
    config = find_config(90, 3072, 8192, 16)
    assert config.num_splits == 8
    assert config.num_partials(16, 3072) == 8 * 3072 * 16
    assert config.epilogue().num_partials(16, 3072) == 0
