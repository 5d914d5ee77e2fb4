import json

import pytest
import torch
from safetensors.torch import load_file

from vllm.checkpoints.inspect import inspect_checkpoint
from vllm.checkpoints.make_codec import make_codec
from vllm.exceptions import ConfigError
from vllm.model_executor.codecs import load_codec


@pytest.mark.parametrize("layout", ["boson", "transformers"])
def test_equal_seeds_give_equal_codecs(tmp_path, layout):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_codec(tmp_path / name, layout=layout, size="tiny", seed=seed)
    a, b, c = (load_codec(tmp_path / name, device="cpu").fingerprint for name in "abc")
    assert a == b
    assert a != c


def test_boson_files_have_the_published_form(tmp_path):
    make_codec(tmp_path, layout="boson", size="tiny", seed=0)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (raw["n_q"], raw["bins"], raw["ratios"]) == (8, 1024, [8, 5, 4, 2, 3])
    assert "model_type" not in raw
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    assert state["decoder_2.model.1.block.1.weight_g"].shape == (64, 1, 1)
    assert state["decoder_2.model.1.block.1.weight_v"].shape == (64, 32, 16)
    assert state["quantizer.vq.layers.0._codebook.embed"].std() > 0.5
    assert "fc_prior.weight" in state


def test_transformers_files_have_plain_weights_and_every_published_key(tmp_path):
    make_codec(tmp_path, layout="transformers", size="tiny", seed=0)
    state = load_file(tmp_path / "model.safetensors")
    assert state["acoustic_decoder.conv1.weight"].shape == (64, 16, 7)
    prefix = "semantic_model.encoder.pos_conv_embed.conv.parametrizations.weight"
    assert state[f"{prefix}.original0"].shape == (1, 1, 16)
    # The published file has 527 tensors; HuBERT here has 10 layers of 16
    # tensors fewer, and the training-only mask embedding is written as well.
    assert len(state) - ("semantic_model.masked_spec_embed" in state) == 527 - 10 * 16


def test_decode_only_leaves_the_encoder_out(tmp_path):
    make_codec(tmp_path, layout="transformers", size="tiny", seed=0, decode_only=True)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert json.loads((tmp_path / "config.json").read_text())["decode_only"] is True
    assert not any(name.startswith(("acoustic_encoder", "semantic", "fc.")) for name in names)


@pytest.mark.parametrize(
    ("layout", "size", "message"),
    [("boson", "huge", "size='huge'"), ("onnx", "tiny", "layout='onnx'")],
)
def test_unknown_choices_are_refused(tmp_path, layout, size, message):
    with pytest.raises(ConfigError, match=message):
        make_codec(tmp_path / "x", layout=layout, size=size, seed=0)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("layout", ["boson", "transformers"])
def test_inspect_reports_on_a_codec(tmp_path, layout):
    make_codec(tmp_path, layout=layout, size="tiny", seed=0, decode_only=layout == "transformers")
    report = inspect_checkpoint(tmp_path)
    assert report.problems == ()
    assert "8 codebooks x 1024 codes" in report.text()
    assert ("decode_only" in report.text()) == (layout == "transformers")
    (tmp_path / ("model.pth" if layout == "boson" else "model.safetensors")).unlink()
    assert inspect_checkpoint(tmp_path).problems
