import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm.checkpoints.make_codec import CODEC_SIZES
from vllm.exceptions import CheckpointError, InvalidRequestError
from vllm.kernels import native
from vllm.model_executor.codecs import higgs, load_codec
from vllm.model_executor.codecs.higgs import HiggsCodecConfig
from vllm.model_executor.codecs.higgs_tensors import codec_key, fold_weight_norm
from vllm.model_executor.codecs.hubert import resample


def random_codes(num_frames, *, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1024, (batch, 8, num_frames), generator=generator)


def random_clip(num_samples, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.2 * torch.randn((1, num_samples), generator=generator)


def copy_with(folder, target, change):
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("num_frames", [1, 2, 9, 30])
@torch.inference_mode()
def test_decode_equals_the_reference(codec, reference, num_frames):
    codes = random_codes(num_frames, batch=2, seed=num_frames)
    expected = reference.decode(codes).audio_values[:, 0]
    samples = codec.decode(codes)
    assert samples.shape == (2, num_frames * 960)
    assert 0.02 < expected.std() < 0.4
    torch.testing.assert_close(samples, expected.clamp(-1, 1), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_decode_is_the_same_with_and_without_the_native_library(codec):
    codes = random_codes(30, batch=2)
    samples = codec.decode(codes)
    with native.disabled():
        torch.testing.assert_close(codec.decode(codes), samples, rtol=0, atol=1e-5)
        part = codec.decode_part(codes, 11, 19)
    torch.testing.assert_close(part, samples[:, 11 * 960 : 19 * 960], rtol=0, atol=1e-5)
    assert torch.equal(codec.decode_part(codes, 11, 19), samples[:, 11 * 960 : 19 * 960])


@pytest.mark.skipif(native.loaded_library() is None, reason="the native library is not built")
@torch.inference_mode()
def test_what_the_native_library_cannot_decode_is_decoded_by_torch(
    codec, codec_folders, monkeypatch, caplog
):
    def refuse(*arguments):
        raise ValueError("no chain")

    monkeypatch.setattr(higgs, "WaveDecoder", refuse)
    with caplog.at_level("WARNING"):
        other = load_codec(codec_folders["decode_only"], device="cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "torch decodes the codec's frames, not the native library: no chain"
    ]
    codes = random_codes(4)
    torch.testing.assert_close(other.decode(codes), codec.decode(codes), rtol=0, atol=1e-5)


class StandIn:
    """For the decoder on CUDA, where this is none."""

    device = torch.device("cpu")
    is_built = False

    def __init__(self, table, table_bias, num_codebooks, layers):
        assert len(table) == num_codebooks * 1024
        assert len(layers) == 37

    def build(self):
        self.is_built = True

    def __call__(self, codes, first, last):
        assert self.is_built
        return torch.arange(first * 960.0, last * 960.0).expand(len(codes), -1)


@torch.inference_mode()
def test_kernels_of_the_device_decode_unless_torch_is_to(codec, codec_folders, monkeypatch):
    monkeypatch.setattr(higgs, "can_decode_in_pairs", lambda device: True)
    monkeypatch.setattr(higgs, "PairWaveDecoder", StandIn)
    folder, codes = codec_folders["decode_only"], random_codes(5, batch=2)
    with native.disabled():
        part = load_codec(folder, device="cpu").decode_part(codes, 2, 4)
        assert torch.equal(part, torch.arange(2 * 960.0, 4 * 960.0).expand(2, -1))
        for other in ({"uses_kernels": False}, {"dtype": torch.float64}):
            by_torch = load_codec(folder, device="cpu", **other).decode(codes)
            torch.testing.assert_close(by_torch, codec.decode(codes), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_kernels_that_cannot_be_built_leave_the_codec_to_torch(
    codec, codec_folders, monkeypatch, caplog
):
    def fail(self):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(higgs, "can_decode_in_pairs", lambda device: True)
    monkeypatch.setattr(higgs, "PairWaveDecoder", StandIn)
    monkeypatch.setattr(StandIn, "build", fail)
    with native.disabled(), caplog.at_level("WARNING"):
        other = load_codec(codec_folders["decode_only"], device="cpu")
        codes = random_codes(4)
        torch.testing.assert_close(other.decode(codes), codec.decode(codes), rtol=0, atol=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        "torch decodes the codec's frames, not our kernels: no compiler"
    ]


@pytest.mark.parametrize("num_frames", [1, 7, 40])
@torch.inference_mode()
def test_encode_equals_the_reference(codec, reference, num_frames):
    clip = random_clip(num_frames * 960, seed=num_frames)
    expected = reference.encode(clip[:, None]).audio_codes
    assert torch.equal(codec.encode(clip), expected)


@torch.inference_mode()
def test_encode_finds_many_different_codes(codec):
    codes = codec.encode(random_clip(30 * 960))
    assert len(codes.unique()) > 50


def test_layouts_load_to_identical_tensors(codec, codec_folders):
    boson = load_codec(codec_folders["boson"], device="cpu")
    for name, tensor in codec.state_dict().items():
        assert torch.equal(boson.state_dict()[name], tensor), name
    assert boson.fingerprint == codec.fingerprint
    assert boson.encoder_fingerprint == codec.encoder_fingerprint


@torch.inference_mode()
def test_decode_only_copy_sounds_and_is_known_the_same(codec, codec_folders):
    small = load_codec(codec_folders["decode_only"], device="cpu")
    codes = random_codes(5)
    assert torch.equal(small.decode(codes), codec.decode(codes))
    assert small.fingerprint == codec.fingerprint
    assert not small.can_encode
    with pytest.raises(InvalidRequestError, match="ref_audio"):
        small.encode(random_clip(960))


def test_decode_only_needs_no_encoder_in_a_full_file(codec_folders, tmp_path):
    folder = shutil.copytree(codec_folders["transformers"], tmp_path / "codec")
    raw = json.loads((folder / "config.json").read_text()) | {"decode_only": True}
    (folder / "config.json").write_text(json.dumps(raw))
    assert not load_codec(folder, device="cpu").can_encode


def test_sizes_are_read_from_the_configuration(codec):
    assert (codec.sample_rate, codec.hop_length, codec.frame_rate) == (24000, 960, 25.0)
    assert (codec.num_codebooks, codec.codebook_size, codec.context_frames) == (8, 1024, 10)


def test_context_of_the_published_codec_is_ten_frames():
    assert CODEC_SIZES["full"].context_frames == 10


def test_context_is_enough_and_not_more_than_needed(codec):
    features = torch.randn(1, 16, 41, dtype=torch.float64, requires_grad=True)
    decoder = codec.acoustic_decoder.double()
    try:
        samples = decoder(features.clone())[0, 0]
        # Dependence by gradient is exact: a frame out of reach has gradient 0.
        grads = torch.autograd.grad(samples[20 * 960 : 21 * 960].abs().sum(), features)[0]
    finally:
        codec.acoustic_decoder.float()
    reached = grads[0].abs().sum(0).nonzero().flatten()
    assert (int(reached.min()), int(reached.max())) == (10, 30)


@pytest.mark.parametrize("num_samples", [0, 959, 961])
def test_encode_refuses_part_frames(codec, num_samples):
    with pytest.raises(InvalidRequestError, match="multiple of 960"):
        codec.encode(torch.zeros(1, num_samples))


def test_missing_tensor_is_named(codec_folders, tmp_path):
    folder = copy_with(
        codec_folders["transformers"], tmp_path / "c", lambda tensors: tensors.pop("fc2.bias")
    )
    with pytest.raises(CheckpointError, match=r"missing: fc2\.bias"):
        load_codec(folder, device="cpu")


def test_surplus_and_misshapen_tensors_are_named(codec_folders, tmp_path):
    def change(tensors):
        tensors["acoustic_decoder.extra.weight"] = torch.zeros(2)
        tensors["fc.bias"] = torch.zeros(3)

    folder = copy_with(codec_folders["transformers"], tmp_path / "c", change)
    with pytest.raises(CheckpointError) as caught:
        load_codec(folder, device="cpu")
    assert "unexpected: acoustic_decoder.extra.weight [2]" in str(caught.value)
    assert "wrong shape: fc.bias is [3], expected [48]" in str(caught.value)


def test_half_of_a_weight_norm_pair_is_named(codec_folders, tmp_path):
    positional = "semantic_model.encoder.pos_conv_embed.conv.parametrizations.weight.original0"
    folder = copy_with(
        codec_folders["transformers"], tmp_path / "c", lambda tensors: tensors.pop(positional)
    )
    with pytest.raises(CheckpointError, match=r"unexpected: .*pos_conv_embed\.conv\.weight_v"):
        load_codec(folder, device="cpu")


def test_a_stray_generation_model_is_recognised(codec_folders, tmp_path):
    def change(tensors):
        tensors.clear()
        tensors["model.embed_tokens.weight"] = torch.zeros(2, 2)

    folder = copy_with(codec_folders["transformers"], tmp_path / "c", change)
    with pytest.raises(CheckpointError, match="generation model"):
        load_codec(folder, device="cpu")


def test_unknown_codec_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "snake_oil"}')
    with pytest.raises(CheckpointError, match="snake_oil"):
        load_codec(tmp_path, device="cpu")


def test_published_configurations_agree():
    boson = {
        "n_filters": 32,
        "D": 256,
        "codebook_dim": 64,
        "target_bandwidths": [0.5, 1, 1.5, 2, 4],
        "ratios": [8, 5, 4, 2, 3],
        "sample_rate": 24000,
        "bins": 1024,
        "n_q": 8,
        "semantic_techer": "hubert_base_general",
    }
    transformers = {
        "model_type": "higgs_audio_v2_tokenizer",
        "target_bandwidths": [0.5, 1, 1.5, 2],
        "acoustic_model_config": {
            "upsampling_ratios": [8, 5, 4, 2, 3],
            "n_codebooks": 9,
            "codebook_dim": 8,
            "sampling_rate": 16000,
        },
        "semantic_model_config": {"model_type": "hubert"},
    }
    assert HiggsCodecConfig.from_dict(boson) == CODEC_SIZES["full"]
    assert HiggsCodecConfig.from_dict(transformers) == CODEC_SIZES["full"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": [2, 1]}, "strides"),
        ({"target_bandwidths": []}, "target_bandwidths"),
        ({"semantic_model_config": {"do_stable_layer_norm": True}}, "do_stable_layer_norm"),
        ({"acoustic_model_config": {"upsampling_ratios": [8], "decoder_hidden_size": 3}}, "3"),
        ({"acoustic_model_config": 5}, "acoustic_model_config"),
    ],
)
def test_unsupported_configurations_are_refused_by_name(codec_folders, change, message):
    raw = json.loads((codec_folders["transformers"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        HiggsCodecConfig.from_dict(raw | change)


@pytest.mark.parametrize(
    ("boson", "name"),
    [
        ("encoder.block.0.weight_g", "acoustic_encoder.conv1.weight_g"),
        (
            "encoder.block.1.block.0.block.0.alpha",
            "acoustic_encoder.block.0.res_unit1.snake1.alpha",
        ),
        ("encoder.block.5.block.2.block.3.bias", "acoustic_encoder.block.4.res_unit3.conv2.bias"),
        ("encoder.block.2.block.3.alpha", "acoustic_encoder.block.1.snake1.alpha"),
        ("encoder.block.2.block.4.weight_v", "acoustic_encoder.block.1.conv1.weight_v"),
        ("encoder.block.6.alpha", "acoustic_encoder.snake1.alpha"),
        ("encoder.block.7.bias", "acoustic_encoder.conv2.bias"),
        ("decoder_2.model.0.bias", "acoustic_decoder.conv1.bias"),
        ("decoder_2.model.1.block.0.alpha", "acoustic_decoder.block.0.snake1.alpha"),
        ("decoder_2.model.3.block.1.weight_g", "acoustic_decoder.block.2.conv_t1.weight_g"),
        ("decoder_2.model.5.block.4.block.1.bias", "acoustic_decoder.block.4.res_unit3.conv1.bias"),
        ("decoder_2.model.6.alpha", "acoustic_decoder.snake1.alpha"),
        ("decoder_2.model.7.weight_v", "acoustic_decoder.conv2.weight_v"),
        ("quantizer.vq.layers.3._codebook.embed", "quantizer.quantizers.3.codebook.embed"),
        ("quantizer.vq.layers.7.project_in.bias", "quantizer.quantizers.7.project_in.bias"),
        ("fc_prior.weight", "fc.weight"),
        ("fc_post1.bias", "fc1.bias"),
        ("fc_post2.weight", "fc2.weight"),
        ("encoder_semantic.conv.conv.weight", "encoder_semantic.conv.weight"),
        (
            "encoder_semantic.conv_blocks.1.res_units.0.conv1.conv.weight",
            "encoder_semantic.conv_blocks.1.res_units.0.conv1.weight",
        ),
        (
            "encoder_semantic.conv_blocks.0.res_units.1.conv2.weight",
            "encoder_semantic.conv_blocks.0.res_units.1.conv2.weight",
        ),
        (
            "encoder_semantic.conv_blocks.0.conv.conv.bias",
            "encoder_semantic.conv_blocks.0.conv.bias",
        ),
        ("decoder_semantic.conv2.conv.weight", "decoder_semantic.conv2.weight"),
        ("acoustic_decoder.conv1.weight", "acoustic_decoder.conv1.weight"),
    ],
)
def test_key_map(boson, name):
    assert codec_key(boson, num_blocks=5) == name


@pytest.mark.parametrize("dim", [0, 2])
def test_weight_norm_is_folded_as_torch_does(dim):
    conv = torch.nn.Conv1d(6, 4, 5)
    normed = torch.nn.utils.parametrizations.weight_norm(conv, dim=dim)
    with torch.no_grad():
        normed.parametrizations.weight.original0.mul_(1.7)
    state = {f"c.{name}": tensor for name, tensor in normed.state_dict().items()}
    folded = dict(fold_weight_norm(state.items()))
    assert set(folded) == {"c.weight", "c.bias"}
    torch.testing.assert_close(folded["c.weight"], normed.weight.detach())


@given(
    num_samples=st.integers(1, 200),
    rates=st.sampled_from([(24000, 16000), (16000, 24000), (44100, 32000), (16000, 16000)]),
)
@settings(max_examples=20, deadline=None)
def test_resample_equals_the_formula(reference_resample, num_samples, rates):
    samples = random_clip(num_samples)
    expected = reference_resample(samples, *rates) if rates[0] != rates[1] else samples
    torch.testing.assert_close(resample(samples, *rates), expected, rtol=0, atol=1e-6)


def test_fingerprint_changes_with_the_codebook(codec, codec_folders, tmp_path):
    def change(tensors):
        tensors["quantizer.quantizers.3.codebook.embed"][5, 2] += 0.5

    folder = copy_with(codec_folders["transformers"], tmp_path / "c", change)
    assert load_codec(folder, device="cpu").fingerprint != codec.fingerprint


def test_encoder_fingerprint_changes_with_the_encoder_alone(codec, codec_folders, tmp_path):
    def change(tensors):
        tensors["fc.bias"][0] += 0.5

    changed = load_codec(
        copy_with(codec_folders["transformers"], tmp_path / "c", change), device="cpu"
    )
    assert changed.fingerprint == codec.fingerprint
    assert changed.encoder_fingerprint != codec.encoder_fingerprint


def test_full_size_has_the_published_parameter_count():
    from vllm.model_executor.codecs.higgs import HiggsCodec

    with torch.device("meta"):
        full = HiggsCodec(CODEC_SIZES["full"])
        small = HiggsCodec(replace(CODEC_SIZES["full"], decode_only=True))
    # As published: encoder 51.3 M, HuBERT 94.4 M, semantic encoder 14.7 M, fc 1.05 M.
    count = {n: sum(p.numel() for p in m.parameters()) / 1e6 for n, m in full.named_children()}
    assert count["acoustic_encoder"] == pytest.approx(51.3, abs=0.05)
    assert count["semantic_model"] == pytest.approx(94.4, abs=0.05)
    assert count["encoder_semantic"] == pytest.approx(14.7, abs=0.05)
    assert count["fc"] == pytest.approx(1.05, abs=0.005)
    assert sum(p.numel() for p in small.parameters()) / 1e6 == pytest.approx(21.56, abs=0.05)
