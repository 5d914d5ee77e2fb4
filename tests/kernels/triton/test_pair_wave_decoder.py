"""Convolutions in pairs of bfloat16 against torch, a codec's decoder, and what is compiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm.checkpoints.make_codec import CODEC_SIZES, make_codec
from vllm.kernels import native, pair_wave_decoder
from vllm.kernels.conv_config import ConvConfig, find_conv_config
from vllm.kernels.pair_wave_decoder import PairWaveDecoder
from vllm.kernels.triton import pair_wave_decoder as kernels
from vllm.kernels.triton.offline import ARCHITECTURES, Compiled
from vllm.kernels.wave_decoder import WaveLayer
from vllm.model_executor.codecs import load_codec
from vllm.model_executor.codecs.higgs import HiggsCodec

# Two bfloat16 hold 16 bits and the sign of the rest; what is multiplied and what comes out have them.
TOLERANCE = 1e-5


@pytest.fixture
def cut(monkeypatch):
    """Says how convolutions are cut from here on; small tiles, so that little work takes several."""

    def use(block_rows: int, block_outputs: int = 16, block_inputs: int = 16) -> None:
        config = ConvConfig(block_rows, block_outputs, block_inputs, num_warps=4, num_stages=2)
        monkeypatch.setattr(pair_wave_decoder, "find_conv_config", lambda *shape: config)

    use(16)
    return use


def pair(values: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """``values`` [batch, rows, channels] as kernels have them, channels filled up."""
    high, low = pair_wave_decoder._split(pair_wave_decoder._padded(values, 2))
    return high.to(device), low.to(device)


def sum_of(x: tuple[Tensor, Tensor], num_channels: int) -> Tensor:
    """What a pair stands for: the channels that are none of the filling, which is zeros."""
    total = x[0].double().cpu() + x[1].double().cpu()
    assert not total[..., num_channels:].any()
    return total[..., :num_channels]


def snake(x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    alpha, inverse = (each.double() for each in factors)
    return x + torch.sin(x * alpha) ** 2 * inverse


def convolution(x: Tensor, layer: WaveLayer) -> Tensor:
    """[batch, rows, inputs] to [batch, rows * phases, outputs] by torch, without Snakes."""
    weight, bias, x = layer.weight.double(), layer.bias.double(), x.double().transpose(1, 2)
    if not layer.upsampling:
        return F.conv1d(x, weight, bias, padding="same", dilation=layer.dilation).transpose(1, 2)
    stride = layer.upsampling
    edges = {"padding": -(-stride // 2), "output_padding": stride % 2}
    return F.conv_transpose1d(x, weight, bias, stride, **edges).transpose(1, 2)


def to(layer: WaveLayer, device: torch.device) -> WaveLayer:
    factors = layer.snake
    if factors is not None:
        factors = (factors[0].to(device), factors[1].to(device))
    weight, bias = layer.weight.to(device), layer.bias.to(device)
    return replace(layer, weight=weight, bias=bias, snake=factors)


def random_snake(num_channels: int) -> tuple[Tensor, Tensor]:
    alpha = torch.rand(num_channels) * 2 + 0.5
    return alpha, 1 / alpha


def check_convolution(
    device: torch.device,
    *,
    num_inputs: int,
    num_outputs: int,
    batch: int = 2,
    num_rows: int = 18,
    kernel_size: int = 7,
    dilation: int = 1,
    upsampling: int = 0,
    adds: bool = False,
) -> None:
    """One layer, ahead of another whose Snake it applies, against torch, with all of its rows."""
    shape = (num_outputs, num_inputs, kernel_size)
    if upsampling:
        shape = (num_inputs, num_outputs, 2 * upsampling)
    weight = torch.randn(shape) / (num_inputs * kernel_size) ** 0.5
    layer = WaveLayer(weight, torch.randn(num_outputs), dilation, upsampling, is_residual=adds)
    following = WaveLayer(
        torch.ones(1, num_outputs, 1), torch.zeros(1), snake=random_snake(num_outputs)
    )
    conv = pair_wave_decoder._pack([layer, following], 0, 90)
    phases = conv.span.phases
    assert phases == max(upsampling, 1)
    x = torch.randn(batch, num_rows, num_inputs)
    residual = torch.randn(batch, num_rows * phases, num_outputs)
    plain = torch.full((batch, num_rows * phases, conv.width), float("nan"))
    if adds:
        plain = pair_wave_decoder._padded(residual, 2)
    plain = plain.to(device)
    out = tuple(torch.full_like(plain, float("nan"), dtype=torch.bfloat16) for _ in range(2))

    kernels.convolve(
        pair(x, device),
        tuple(each.to(device) for each in conv.weight),
        conv.bias.to(device),
        tuple(each.to(device) for each in conv.snake),
        plain if adds else None,
        out,
        plain,
        conv.config,
        dilation=conv.span.dilation,
        num_steps=num_rows + (upsampling > 0),
        shift=conv.span.shift,
    )

    expected = convolution(x, layer) + (residual.double() if adds else 0)
    assert_near(plain[..., :num_outputs], expected)
    assert_near(sum_of(out, num_outputs), snake(expected, following.snake))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    error = (actual.cpu().double() - expected).norm() / expected.norm()
    assert error < TOLERANCE, error


@pytest.mark.parametrize(
    "layer",
    [
        {"num_inputs": 20, "num_outputs": 35, "dilation": 3},
        {"num_inputs": 32, "num_outputs": 16, "dilation": 9, "num_rows": 5},  # all rows are edges
        {"num_inputs": 16, "num_outputs": 16, "kernel_size": 1, "adds": True},
        {"num_inputs": 40, "num_outputs": 9, "upsampling": 5},
        {"num_inputs": 16, "num_outputs": 16, "upsampling": 8, "num_rows": 3},
    ],
    ids=["dilated", "short", "residual", "odd upsampling", "even upsampling"],
)
def test_a_convolution_equals_torch(device, cut, layer):
    check_convolution(device, **layer)


@settings(
    deadline=None,
    max_examples=5,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    num_inputs=st.integers(1, 40),
    num_outputs=st.integers(1, 40),
    batch=st.integers(1, 2),
    num_rows=st.integers(1, 30),
    kernel_size=st.sampled_from([1, 3, 7]),
    dilation=st.integers(1, 9),
    upsampling=st.sampled_from([0, 0, 2, 3]),
)
def test_a_convolution_takes_any_shape(device, cut, upsampling, dilation, **shape):
    check_convolution(
        device, **shape, upsampling=upsampling, dilation=1 if upsampling else dilation
    )


@pytest.mark.parametrize(
    ("num_inputs", "kernel_size", "dilation", "num_rows"), [(3, 7, 1, 150), (40, 3, 2, 4)]
)
def test_samples_equal_torch_and_are_cut_off(device, num_inputs, kernel_size, dilation, num_rows):
    weight = torch.randn(1, num_inputs, kernel_size) / (num_inputs * kernel_size) ** 0.5
    layer = WaveLayer(weight, torch.tensor([0.1]), dilation)
    decoder = PairWaveDecoder(
        *(torch.randn(9, num_inputs).to(device), torch.randn(num_inputs).to(device), 1),
        [to(layer, device)],
        arch=90,
    )
    codes = torch.randint(9, (2, 1, num_rows))

    samples = decoder(codes.to(device)).cpu()

    rows = decoder._table.cpu()[codes[:, 0]] + decoder._table_bias.cpu()
    expected = convolution(rows, layer)[..., 0].clamp(-1, 1)
    torch.testing.assert_close(samples.double(), expected, rtol=0, atol=4e-5)
    assert (samples.abs() == 1).any()


@pytest.mark.parametrize(("first", "last"), [(0, 4), (1, 3)])
def test_codes_become_sums_of_rows(device, first, last):
    table, bias = torch.randn(3 * 11, 21), torch.randn(21)
    codes = torch.randint(11, (2, 3, 4))
    shape = (2, last - first, 32)
    out = tuple(torch.full(shape, float("nan"), dtype=torch.bfloat16) for _ in range(2))
    out = tuple(each.to(device) for each in out)

    kernels.sum_codes(
        *(codes.to(device), table.to(device), bias.to(device), out), first_frame=first
    )

    rows = (codes + torch.arange(3)[:, None] * 11).transpose(1, 2)[:, first:last]
    assert_near(sum_of(out, 21), table.double()[rows].sum(2) + bias.double())


@triton.jit
def _sine_kernel(x_ptr, out_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out_ptr + at, kernels._sin_squared(tl.load(x_ptr + at)))


@pytest.mark.parametrize(("limit", "tolerance"), [(4.0, 2e-7), (2e4, 1e-6)])
def test_squares_of_sines_are_right_for_large_angles_too(device, limit, tolerance):
    x = torch.linspace(-limit, limit, 4096)
    out = torch.empty_like(x, device=device)
    _sine_kernel[(1,)](x.to(device), out, COUNT=4096)
    expected = torch.sin(x.double()) ** 2
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=tolerance)


def decoder_of(codec: HiggsCodec, device: torch.device) -> PairWaveDecoder:
    layers = list(codec.to(device).acoustic_decoder.layers())
    return PairWaveDecoder(codec.table, codec.table_bias, codec.num_codebooks, layers, arch=90)


def random_codec(folder: Path, size: str) -> HiggsCodec:
    make_codec(folder, layout="transformers", size=size, seed=0, decode_only=True)
    codec = load_codec(folder, device="cpu", uses_kernels=False)
    assert isinstance(codec, HiggsCodec)
    return codec


@pytest.mark.parametrize(
    ("size", "num_frames"), [("tiny", 2), pytest.param("full", 1, marks=pytest.mark.slow)]
)
def test_a_codecs_samples_keep_80_decibels(device, request, tmp_path, size, num_frames):
    """60 were asked for; pairs leave some 90, and one half-precision product 53."""
    if size == "tiny":  # the other one is cut as on a card
        request.getfixturevalue("cut")(1024)  # tiles are what takes the interpreter time
    codec = random_codec(tmp_path, size)
    codes = torch.randint(codec.codebook_size, (1, codec.num_codebooks, num_frames))
    with native.disabled():
        expected = codec.decode(codes).double()

    samples = decoder_of(codec, device)(codes.to(device)).cpu().double()

    assert samples.shape == expected.shape
    noise = (samples - expected).square().mean()
    decibels = 10 * torch.log10(expected.square().mean() / noise).item()
    print(f"{size} codec, {num_frames} frames: {decibels:.1f} dB")
    assert decibels > 80


@st.composite
def chains(draw: st.DrawFn) -> list[WaveLayer]:
    """Layers from 5 channels to samples, with any mixture of the kinds in between.

    Few sizes, since a card has to have a kernel built for each.
    """
    layers, width = [], 5
    for kind in draw(
        st.lists(st.sampled_from(["plain", "up", "residual", "residual"]), max_size=4)
    ):
        before, after = width, width if kind == "residual" else draw(st.integers(1, 16))
        kernel_size, dilation = draw(st.sampled_from([1, 7])), draw(st.integers(1, 9))
        if kind == "up":
            stride = draw(st.sampled_from([2, 3, 5]))
            layers.append(random_layer(before, after, 2 * stride, upsampling=stride))
        else:
            layers.append(random_layer(before, after, kernel_size, dilation=dilation))
        if kind == "residual":
            layers.append(random_layer(after, after, 1, is_residual=len(layers) > 1))
        width = after
    layers.append(random_layer(width, 1, 7, dilation=draw(st.integers(1, 3))))
    return [replace(layers[0], snake=None), *layers[1:]]


def random_layer(num_inputs: int, num_outputs: int, kernel_size: int, **options) -> WaveLayer:
    shape = (num_outputs, num_inputs, kernel_size)
    if options.get("upsampling"):
        shape = (num_inputs, num_outputs, kernel_size)
    weight = torch.randn(shape) / (num_inputs * kernel_size) ** 0.5
    return WaveLayer(weight, torch.randn(num_outputs), snake=random_snake(num_inputs), **options)


def decoder_of_layers(layers: list[WaveLayer], device: torch.device) -> PairWaveDecoder:
    """For two codebooks of 9 codes."""
    table, bias = torch.randn(2 * 9, 5, device=device), torch.randn(5, device=device)
    return PairWaveDecoder(table, bias, 2, [to(each, device) for each in layers], arch=90)


@settings(
    deadline=None,
    max_examples=8,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(layers=chains(), num_frames=st.integers(1, 30), batch=st.integers(1, 2), data=st.data())
def test_some_frames_of_a_window_have_the_bits_of_all(device, cut, layers, num_frames, batch, data):
    first = data.draw(st.integers(0, num_frames), label="first")
    last = data.draw(st.integers(first, num_frames), label="last")
    decoder = decoder_of_layers(layers, device)
    codes = torch.randint(9, (batch, 2, num_frames), device=device)
    whole = decoder(codes)
    hop = whole.shape[1] // num_frames
    part = decoder(codes, first, last)
    assert torch.equal(part, whole[:, first * hop : last * hop])


def test_a_window_has_the_same_bits_beside_others(device, cut):
    layers = [
        replace(random_layer(5, 16, 7), snake=None),
        random_layer(16, 16, 6, upsampling=3),
        random_layer(16, 16, 7, dilation=9),
        random_layer(16, 16, 1, is_residual=True),
        random_layer(16, 16, 3),
        random_layer(16, 16, 1, is_residual=True),
        random_layer(16, 1, 7),
    ]
    decoder = decoder_of_layers(layers, device)
    codes = torch.randint(9, (3, 2, 7), device=device)
    together = decoder(codes)
    assert together.shape == (3, 21)
    assert torch.equal(decoder(codes[1:2]), together[1:2])
    assert torch.equal(decoder(codes.flip(0)), together.flip(0))
    assert torch.equal(decoder(codes.flip(0), 2, 5), together.flip(0)[:, 6:15])


@pytest.mark.parametrize(
    ("shape", "part"), [((0, 2, 5), (0, 5)), ((2, 2, 0), (0, 0)), ((2, 2, 5), (3, 3))]
)
def test_nothing_is_decoded_of_nothing(device, shape, part):
    layers = [WaveLayer(torch.randn(1, 5, 3, device=device), torch.zeros(1, device=device))]
    table = torch.randn(2 * 9, 5, device=device)
    decoder = PairWaveDecoder(table, table[0], 2, layers, arch=90)
    samples = decoder(torch.zeros(shape, dtype=torch.int64, device=device), *part)
    assert samples.shape == (shape[0], part[1] - part[0])


ONE, ZERO = torch.ones(1, 1, 1), torch.zeros(1)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "begins"),
        ([WaveLayer(ONE, ZERO, snake=(ZERO, ZERO))], "begins"),
        ([WaveLayer(torch.ones(2, 1, 1), torch.ones(2))], "ends"),  # two outputs
        ([WaveLayer(torch.ones(1, 1, 4), ZERO, upsampling=2)], "ends"),
        ([WaveLayer(torch.ones(1, 2, 1), ZERO)], "link"),  # two inputs of one
        ([WaveLayer(torch.ones(1, 1, 2), ZERO)], "link"),  # an even kernel
        ([WaveLayer(ONE, ZERO), WaveLayer(ONE, ZERO, is_residual=True)], "add"),
    ],
)
def test_other_chains_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        PairWaveDecoder(torch.ones(3, 1), ZERO, 1, layers, arch=90)


# Convolutions of the published codec by name: outputs of all phases, inputs, taps.
SHAPES = {
    "first": (1024, 256, 7),
    **{
        f"up {width}": (phases * width, 2 * width, 2)
        for width, phases in zip((512, 256, 128, 64, 32), CODEC_SIZES["full"].ratios, strict=True)
    },
    **{f"dilated {width}": (width, width, 7) for width in (512, 256, 128, 64, 32)},
    **{f"residual {width}": (width, width, 1) for width in (512, 256, 128, 64, 32)},
}


def compile_convolution(compile_offline, arch: int, name: str) -> tuple[Compiled, ConvConfig]:
    num_outputs, num_inputs, num_taps = SHAPES[name]
    config = find_conv_config(arch, num_outputs, num_inputs, num_taps)
    names = ("high_ptr", "low_ptr", "weight_high_ptr", "weight_low_ptr")
    signature = dict.fromkeys((*names, "out_high_ptr", "out_low_ptr"), "*bf16")
    signature |= dict.fromkeys(("bias_ptr", "alpha_ptr", "inverse_ptr"), "*fp32")
    rows = ("num_rows", "first_row", "num_out_rows", "shift", "num_plain_rows")
    signature |= dict.fromkeys(("dilation", *rows), "i32")
    more = ("residual_ptr", "plain_ptr")
    constants: dict[str, object] = {
        "NUM_OUTPUTS": num_outputs,
        "NUM_INPUTS": num_inputs,
        "NUM_TAPS": num_taps,
        "WIDTH": num_inputs // 2 if num_taps == 2 else num_outputs,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_OUTPUTS": config.block_outputs,
        "BLOCK_INPUTS": config.block_inputs,
    }
    if name.startswith("residual"):
        signature |= dict.fromkeys(more, "*fp32")
    else:
        constants |= dict.fromkeys(more)
    compiled = compile_offline(
        "vllm.kernels.triton.pair_wave_decoder:convolve_kernel",
        signature,
        constants,
        arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return compiled, config


_QUICK = (90, "dilated 128")  # the one that every test run compiles; --slow compiles all


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        pytest.param(arch, name, marks=[] if (arch, name) == _QUICK else pytest.mark.slow)
        for arch in ARCHITECTURES
        for name in SHAPES
    ],
)
def test_a_convolution_compiles_to_a_good_loop(compile_offline, arch, name):
    compiled, config = compile_convolution(compile_offline, arch, name)
    product = f"HGMMA.64x{config.block_outputs}x16.F32.BF16"
    wanted = [product if arch >= 90 else "HMMA.16816.F32.BF16", "STG.E.128"]
    if config.block_inputs < SHAPES[name][1] * SHAPES[name][2]:  # more than one turn
        wanted.append("LDGSTS.E.BYPASS.128")
    assert compiled.faults(contains=tuple(wanted)) == []
    # Three to a product, the fourth being too small to count.
    products = compiled.count(product if arch >= 90 else "HMMA.16816.F32.BF16")
    assert products % 3 == 0


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_the_ends_of_the_chain_compile(compile_offline, arch):
    module = "vllm.kernels.triton.pair_wave_decoder"
    pairs = dict.fromkeys(("high_ptr", "low_ptr"), "*bf16")
    sums = compile_offline(
        f"{module}:sum_codes_kernel",
        {
            "codes_ptr": "*i64",
            **dict.fromkeys(("table_ptr", "bias_ptr"), "*fp32"),
            **pairs,
            **dict.fromkeys(("num_frames", "first_frame"), "i32"),
        },
        {
            "NUM_CODEBOOKS": 8,
            "CODEBOOK_SIZE": 1024,
            "NUM_COLUMNS": 256,
            "NUM_OUTPUTS": 256,
            "BLOCK_OUTPUTS": 256,
        },
        arch,
    )
    assert sums.faults(contains=("LDG.E.64", "STG.E")) == []
    samples = compile_offline(
        f"{module}:samples_kernel",
        {
            **pairs,
            **dict.fromkeys(("weight_ptr", "bias_ptr", "samples_ptr"), "*fp32"),
            **dict.fromkeys(("dilation", "num_rows", "first_row", "num_samples"), "i32"),
        },
        {"NUM_INPUTS": 32, "NUM_TAPS": 7, "BLOCK_ROWS": 128, "BLOCK_INPUTS": 32},
        arch,
    )
    assert samples.faults(contains=("LDG.E.128", "FFMA", "STG.E")) == []
