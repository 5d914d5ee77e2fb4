"""Random checkpoints: reproducible, loadable here and in transformers, honestly reported."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from vllm.checkpoints import run_inspect, run_make
from vllm.checkpoints.inspect import inspect_checkpoint
from vllm.checkpoints.make_model import make_model
from vllm.exceptions import CheckpointError
from vllm.model_executor.models import load_model
from vllm.model_executor.weights import iter_tensors


@pytest.fixture(scope="module", params=["boson", "transformers"])
def tiny(request, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp(request.param)
    text = run_make(out_dir, layout=request.param, size="tiny", seed=5)
    return request.param, out_dir, text


def test_tiny_has_its_documented_sizes(tiny):
    layout, out_dir, _ = tiny
    spec = load_model(out_dir / "lm", max_model_len=16).spec
    assert spec.layout == layout
    assert (spec.num_layers, spec.hidden_size, spec.num_kv_heads, spec.head_dim) == (6, 256, 2, 64)
    assert (spec.num_codebooks, spec.codebook_size) == (8, 1026)
    assert (out_dir / "codec" / "config.json").is_file()


def test_report_finds_no_problem(tiny):
    layout, out_dir, made = tiny
    text, is_good = run_inspect(out_dir)
    assert is_good
    assert text == made
    assert f"tensor keys       {layout}" in text
    assert "6 layers x 256" in text


def test_equal_seeds_give_equal_weights_in_either_layout(tiny, tmp_path):
    _, out_dir, _ = tiny
    other = "boson" if tiny[0] == "transformers" else "transformers"
    make_model(tmp_path / "same", layout=other, seed=5)
    make_model(tmp_path / "different", layout=other, seed=6)
    hidden = torch.randn(2, 256)
    ours, same, different = (
        load_model(folder, max_model_len=16).audio_logits(hidden)
        for folder in (out_dir / "lm", tmp_path / "same", tmp_path / "different")
    )
    assert torch.equal(ours, same)
    assert not torch.equal(ours, different)


def test_ids_of_the_configuration_are_those_of_the_tokenizer(tiny):
    layout, out_dir, _ = tiny
    config = json.loads((out_dir / "lm" / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(out_dir / "lm" / "tokenizer.json"))
    name = "audio_out_token_idx" if layout == "boson" else "audio_token_id"
    assert config[name] == tokenizer.token_to_id("<|AUDIO_OUT|>")
    text = "Grüße, 世界!"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("<|audio_out_bos|>", add_special_tokens=False).ids) == 1


def test_transformers_opens_model_and_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    make_model(tmp_path, layout="transformers")
    _, report = transformers.HiggsAudioV2ForConditionalGeneration.from_pretrained(
        tmp_path, use_text_head=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    quiet = "Audio is recorded from a quiet room."
    messages = [
        {"role": "system", "content": "Generate audio following instruction."},
        {"role": "scene", "content": [{"type": "text", "text": quiet}]},
        {"role": "user", "content": [{"type": "text", "text": " Some words. "}]},
        {"role": "assistant", "content": [{"type": "audio"}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    user = "<|start_header_id|>user<|end_header_id|>\n\n"
    assistant = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert rendered == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Generate audio following instruction.\n\n"
        f"<|scene_desc_start|>\n{quiet}\n<|scene_desc_end|><|eot_id|>"
        f"{user}Some words.<|eot_id|>"
        f"{assistant}<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
        f"{user}Hello.<|eot_id|>{assistant}<|audio_out_bos|>"
    )


def test_unknown_size_and_layout_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'huge' is none of tiny, medium, 3b"):
        make_model(tmp_path, size="huge")
    with pytest.raises(CheckpointError, match="layout 'gguf'"):
        make_model(tmp_path, layout="gguf")


def test_inspection_names_what_is_wrong(tmp_path):
    from safetensors.torch import save_file

    make_model(tmp_path, layout="boson")
    tensors = dict(iter_tensors(tmp_path))
    tensors.pop("norm.weight")
    tensors["stray.weight"] = torch.ones(2)
    tensors["layers.0.input_layernorm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").unlink()
    report = inspect_checkpoint(tmp_path)
    assert set(report.problems) == {
        "missing: model.norm.weight [256]",
        "unexpected: stray.weight [2]",
        "wrong shape: model.layers.0.input_layernorm.weight is [3], expected [256]",
        "no tokenizer.json",
    }
    with pytest.raises(CheckpointError, match=r"unexpected: stray\.weight"):
        load_model(tmp_path)


def test_inspection_of_an_empty_folder_is_a_finding(tmp_path):
    text, is_good = run_inspect(tmp_path)
    assert not is_good
    assert "no config.json" in text
