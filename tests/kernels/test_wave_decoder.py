"""Native decoding of codes against the codec's torch, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.kernels import native
from vllm.kernels.wave_decoder import WaveDecoder, WaveLayer
from vllm.model_executor.codecs.higgs import HiggsCodec, HiggsCodecConfig

pytestmark = pytest.mark.skipif(
    native.loaded_library() is None, reason="the native library is not built"
)


@pytest.fixture(scope="module", params=native.supported_isas(), autouse=True)
def isa(request):
    before = native.isa()
    native.select_isa(request.param)
    yield
    native.select_isa(before)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_codec(*, ratios, width, acoustic_size=5, num_codebooks=2, seed=0):
    """A codec of random weights, loud enough to be compared within 1e-5 of a full scale of 1."""
    config = HiggsCodecConfig(
        num_codebooks=num_codebooks,
        codebook_size=12,
        codebook_dim=3,
        acoustic_size=acoustic_size,
        decoder_size=width << len(ratios),
        ratios=tuple(ratios),
        decode_only=True,
    )
    generator = torch.Generator().manual_seed(seed)
    codec = HiggsCodec(config)
    for name, parameter in codec.state_dict().items():
        if name.endswith("alpha"):
            parameter.uniform_(0.5, 3.0, generator=generator)
        elif parameter.is_floating_point():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
            parameter.normal_(generator=generator).div_(2 * fan_in**0.5)
    codec.row_offsets.copy_(torch.arange(num_codebooks)[:, None] * 12)
    codec.finish_loading()
    return codec.requires_grad_(False)


def native_decoder(codec):
    layers = list(codec.acoustic_decoder.layers())
    return WaveDecoder(codec.table, codec.table_bias, codec.num_codebooks, layers)


def random_codes(num_codebooks, num_frames, *, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(size, (num_codebooks, num_frames), generator=generator)


@settings(deadline=None, max_examples=25)
@given(
    ratios=st.lists(st.integers(2, 8), min_size=0, max_size=3),
    width=st.integers(1, 21),
    acoustic_size=st.integers(1, 40),
    num_codebooks=st.integers(1, 9),
    num_frames=st.integers(1, 14),
    seed=st.integers(0, 99),
)
def test_equals_the_codecs_torch(ratios, width, acoustic_size, num_codebooks, num_frames, seed):
    codec = make_codec(
        ratios=ratios,
        width=width,
        acoustic_size=acoustic_size,
        num_codebooks=num_codebooks,
        seed=seed,
    )
    codes = random_codes(num_codebooks, num_frames, seed=seed)
    expected = codec.decode(codes[None])[0]  # by torch: this codec was not loaded from a folder
    samples = native_decoder(codec)(codes, 0, num_frames)
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("width", "acoustic_size"), [(32, 256), (6, 64), (2, 16)])
def test_equals_torch_in_the_shapes_of_published_and_small_codecs(width, acoustic_size):
    codec = make_codec(
        ratios=(8, 5, 4, 2, 3), width=width, acoustic_size=acoustic_size, num_codebooks=8
    )
    codes = random_codes(8, 3)
    expected = codec.decode(codes[None])[0]
    samples = native_decoder(codec)(codes, 0, 3)
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(
    num_frames=st.integers(1, 30),
    bounds=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    ratios=st.sampled_from([(3, 2), (2, 5), (4,)]),
)
def test_a_part_has_the_bits_that_it_has_in_the_whole(num_frames, bounds, ratios):
    first, last = sorted(min(bound, num_frames) for bound in bounds)
    codec = make_codec(ratios=ratios, width=9)
    decoder = native_decoder(codec)
    codes = random_codes(2, num_frames)
    whole = decoder(codes, 0, num_frames)
    hop = codec.hop_length
    part = decoder(codes, first, last)
    assert torch.equal(part, whole[first * hop : last * hop])
    # Frames out of reach do not matter either, nor does where the window begins.
    begin, end = max(0, first - codec.context_frames), min(num_frames, last + codec.context_frames)
    window = decoder(codes[:, begin:end], first - begin, last - begin)
    assert torch.equal(window, part)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_change_no_bit(num_threads, set_threads):
    decoder = native_decoder(make_codec(ratios=(8, 5, 3), width=20))
    codes = random_codes(2, 40)
    set_threads(1)
    alone = decoder(codes, 3, 31)
    set_threads(num_threads)
    assert torch.equal(decoder(codes, 3, 31), alone)


def test_what_an_earlier_decode_left_behind_is_not_read():
    quiet = native_decoder(make_codec(ratios=(3, 2), width=9))
    codes = random_codes(2, 20)
    expected = quiet(codes, 0, 20)
    broken = make_codec(ratios=(3, 2), width=33)
    broken.table.fill_(float("nan"))
    assert native_decoder(broken)(random_codes(2, 40), 0, 40).isnan().all()
    assert torch.equal(quiet(codes, 0, 20), expected)


def test_snakes_of_large_angles():
    x, alpha = torch.linspace(-0.5, 0.5, 4001), torch.tensor([4e4])
    one, zero = torch.ones(1, 1, 1), torch.zeros(1)
    layers = [WaveLayer(one, zero), WaveLayer(one, zero, snake=(alpha, torch.tensor([0.5])))]
    samples = WaveDecoder(x[:, None], zero, 1, layers)(torch.arange(4001)[None], 0, 4001)
    expected = x + 0.5 * torch.sin((x * alpha).double()) ** 2
    torch.testing.assert_close(samples, expected.float(), rtol=0, atol=1e-6)


def test_codes_out_of_range_are_refused():
    decoder = native_decoder(make_codec(ratios=(2,), width=2))
    for code in (-1, 12):
        with pytest.raises(IndexError, match=r"allowed are 0\.\.11"):
            decoder(torch.tensor([[0], [code]]), 0, 1)


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [WaveLayer(torch.ones(2, 1, 1), torch.ones(2))],  # two outputs
        [WaveLayer(torch.ones(1, 2, 1), torch.ones(1))],  # two inputs of one
        [WaveLayer(torch.ones(1, 1, 2), torch.ones(1))],  # an even kernel
        [WaveLayer(torch.ones(1, 1, 1), torch.ones(1), is_residual=True)],  # of nothing
    ],
)
def test_other_chains_are_refused(layers):
    with pytest.raises(ValueError, match="no chain"):
        WaveDecoder(torch.ones(3, 1), torch.zeros(1), 1, layers)
