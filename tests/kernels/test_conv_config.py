"""How convolutions are cut: what the table holds, and what the rule makes of other shapes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm.checkpoints.make_codec import CODEC_SIZES
from vllm.kernels import conv_config
from vllm.kernels.conv_config import find_conv_config

MULTIPLES_OF_16 = st.integers(1, 300).map(lambda count: 16 * count)


@given(
    arch=st.sampled_from([80, 86, 89, 90]),
    num_outputs=MULTIPLES_OF_16,
    num_inputs=MULTIPLES_OF_16,
    num_taps=st.integers(1, 11),
)
def test_any_shape_is_cut_into_tiles_that_a_card_holds(arch, num_outputs, num_inputs, num_taps):
    config = find_conv_config(arch, num_outputs, num_inputs, num_taps)
    assert num_inputs % config.block_inputs == 0
    for size in (config.block_rows, config.block_outputs, config.block_inputs):
        assert size >= 16
        assert size.bit_count() == 1
    pair_bytes = 4 * config.block_inputs * (config.block_rows + config.block_outputs)
    assert pair_bytes * config.num_stages <= (227 << 10 if arch >= 90 else 99 << 10)
    row_tiles, output_tiles, windows = config.grid(3, 100, num_outputs)
    assert windows == 3
    assert 0 <= row_tiles * config.block_rows - 100 < config.block_rows
    assert 0 <= output_tiles * config.block_outputs - num_outputs < config.block_outputs


def test_the_table_holds_the_published_codec_unmeasured():
    sizes = CODEC_SIZES["full"]
    shapes = {(sizes.decoder_size, sizes.acoustic_size, 7)}
    for index, phases in enumerate(sizes.ratios):
        inputs = sizes.decoder_size >> index
        width = inputs // 2
        shapes |= {(phases * width, inputs, 2), (width, width, 7), (width, width, 1)}
    table = conv_config._table()
    assert table.keys() == {"sm_90"}
    assert table["sm_90"].keys() == {"x".join(map(str, shape)) for shape in shapes}
    assert not any(find_conv_config(90, *shape).is_measured for shape in shapes)


def test_what_was_measured_stands_above_the_rule(monkeypatch):
    entry = {"block_rows": 32, "num_stages": 2, "triton_us": 1.0, "cudnn_us": 2.0}
    monkeypatch.setattr(conv_config, "_table", lambda: {"sm_90": {"48x16x3": entry}})
    config = find_conv_config.__wrapped__(90, 48, 16, 3)
    assert (config.block_rows, config.block_outputs, config.num_stages) == (32, 64, 2)
    assert config.is_measured
    assert not find_conv_config.__wrapped__(89, 48, 16, 3).is_measured
