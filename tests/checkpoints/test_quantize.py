"""Writing quantised checkpoints: what is kept, how it is cut into files, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vllm.checkpoints import quantize as quantize_module
from vllm.checkpoints.make_model import make_model
from vllm.checkpoints.quantize import quantize_checkpoint
from vllm.entrypoints.cli import main
from vllm.exceptions import CheckpointError
from vllm.kernels.quantize import WeightFormat
from vllm.model_executor.weights import iter_tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_model(folder, layout="boson", seed=1)
    return folder


def test_other_files_and_tensors_are_kept(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path, WeightFormat.INT8)
    for file in source.glob("*.json"):
        if file.name != "config.json":
            assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "int8"}
    assert config == json.loads((source / "config.json").read_text())
    before, after = dict(iter_tensors(source)), dict(iter_tensors(tmp_path))
    kept = [name for name in before if "norm" in name or "embed" in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_large_models_are_cut_into_indexed_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(source, tmp_path / "whole", WeightFormat.INT4)
    monkeypatch.setattr(quantize_module, "_SHARD_BYTES", 4 << 20)
    quantize_checkpoint(source, tmp_path / "cut", WeightFormat.INT4)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    whole, cut = (dict(iter_tensors(tmp_path / name)) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_what_was_there_before_is_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    quantize_checkpoint(source, tmp_path, WeightFormat.INT8)
    assert [each.name for each in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


def test_it_does_not_overwrite_its_source(source: Path) -> None:
    with pytest.raises(CheckpointError, match="would overwrite"):
        quantize_checkpoint(source, source, WeightFormat.INT8)


def test_once_is_enough(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "once", WeightFormat.INT8)
    with pytest.raises(CheckpointError, match="holds int8 weights already"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", WeightFormat.INT4)


def test_command_says_what_it_cost(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--quantization", "int4", "--out", str(tmp_path), "--num-frames", "2"]
    assert main(["checkpoint", "quantize", str(source), *flags]) == 0
    text = capsys.readouterr().out
    assert "weights           int4" in text
    assert "against float32   2 frames under teacher forcing: logits off by" in text
