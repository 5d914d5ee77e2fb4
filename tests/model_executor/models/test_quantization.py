"""Models with int8 and int4 weights: on load, from a saved checkpoint, native and in torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vllm.checkpoints import run_inspect, run_quantize
from vllm.checkpoints.divergence import measure_divergence
from vllm.checkpoints.make_model import make_model
from vllm.config import ModelConfig
from vllm.exceptions import CheckpointError, ConfigError
from vllm.kernels import native
from vllm.kernels.quantize import WeightFormat
from vllm.model_executor.models import load_model
from vllm.model_executor.models.higgs_audio import HiggsAudioModel
from vllm.model_executor.models.interface import SpeechModel
from vllm.model_executor.weights import iter_tensors
from vllm.platforms import Platform

FORMATS = ["int8", "int4"]


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_model(folder, layout="transformers", seed=3)
    return folder


@pytest.fixture(scope="module", params=FORMATS)
def saved(
    request: pytest.FixtureRequest, plain_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    run_quantize(plain_folder, folder, quantization=request.param, num_frames=0)
    return request.param, folder


def logits(model: SpeechModel) -> torch.Tensor:
    """Of a layer's feed-forward block and the head, which needs no cache."""
    torch.manual_seed(0)
    hidden = torch.randn(5, model.spec.hidden_size)
    return model.audio_logits(hidden + model.layers[0].audio_ffn(hidden))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("quantization", "limit"), [("int8", 0.03), ("int4", 0.15)])
def test_logits_stay_near(plain_folder: Path, quantization: str, limit: float) -> None:
    exact = logits(load_model(plain_folder, max_model_len=16))
    rounded = logits(load_model(plain_folder, max_model_len=16, quantization=quantization))
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < limit


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.skipif(native.loaded_library() is None, reason="the native library is not built")
def test_native_and_torch_agree(plain_folder: Path, quantization: str) -> None:
    model = load_model(plain_folder, max_model_len=16, quantization=quantization)
    with native.disabled():
        in_torch = load_model(plain_folder, max_model_len=16, quantization=quantization)
    expected = logits(in_torch)
    # A rounding tie of an input may fall the other way.
    assert (logits(model) - expected).norm() / expected.norm() < 2e-3


def test_a_saved_checkpoint_is_what_quantising_on_load_gives(
    saved: tuple[str, Path], plain_folder: Path
) -> None:
    quantization, folder = saved
    from_saved = logits(load_model(folder, max_model_len=16))
    on_load = logits(load_model(plain_folder, max_model_len=16, quantization=quantization))
    assert torch.equal(from_saved, on_load)


def test_a_saved_checkpoint_is_without_problems(saved: tuple[str, Path]) -> None:
    quantization, folder = saved
    text, is_sound = run_inspect(folder)
    assert is_sound, text
    assert f"quantised         {quantization}" in text


def test_divergence_is_small_and_finite(saved: tuple[str, Path], plain_folder: Path) -> None:
    quantization, folder = saved
    exact, rounded = (load_model(each, max_model_len=64) for each in (plain_folder, folder))
    found = measure_divergence(exact, rounded, torch.arange(9), num_frames=12)
    limit = {"int8": 0.1, "int4": 0.6}[quantization]
    assert 0 < found.logit_error < limit
    assert 0 < found.kl_mean <= found.kl_max < limit**2 * 5
    assert found.sample_agreement > {"int8": 0.7, "int4": 0.3}[quantization]


def test_a_model_does_not_diverge_from_itself(plain_folder: Path) -> None:
    model = load_model(plain_folder, max_model_len=64)
    found = measure_divergence(model, model, torch.arange(5), num_frames=4)
    assert (found.logit_error, found.kl_max) == (0, 0)
    assert (found.top1_agreement, found.sample_agreement) == (1, 1)


def test_a_saved_checkpoint_is_small(saved: tuple[str, Path], plain_folder: Path) -> None:
    def num_bytes(folder: Path) -> int:
        return sum(tensor.nbytes for name, tensor in iter_tensors(folder) if "_proj" in name)

    quantization, folder = saved
    limit = {"int8": 0.26, "int4": 0.15}[quantization]
    assert num_bytes(folder) < limit * num_bytes(plain_folder)


def test_a_saved_checkpoint_is_refused_as_another_format(saved: tuple[str, Path]) -> None:
    quantization, folder = saved
    other = next(each for each in FORMATS if each != quantization)
    with pytest.raises(ConfigError, match=f"--quantization {other}: .* holds {quantization}"):
        load_model(folder, max_model_len=16, quantization=other)


def test_scales_without_their_matrix_are_named(saved: tuple[str, Path]) -> None:
    from vllm.model_executor.weights import dequantized

    _, folder = saved
    tensors = [(name, each) for name, each in iter_tensors(folder) if name.endswith("_scale")]
    assert [name for name, _ in dequantized(tensors)] == [name for name, _ in tensors]


def test_only_float32_is_quantised(plain_folder: Path) -> None:
    with pytest.raises(ConfigError, match="leave --dtype out"):
        load_model(plain_folder, max_model_len=16, dtype="bfloat16", quantization="int8")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims a CUDA card of compute capability 8.0, as far as loading looks before it loads."""
    capability = property(lambda platform: 80 if platform.is_cuda else None)
    monkeypatch.setattr(Platform, "compute_capability", capability)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [("int4", "on the CPU only.* fp8"), ("fp8", r"8\.9, and this card has 8\.0; .* int8")],
)
@pytest.mark.usefixtures("card")
def test_a_card_refuses_what_it_cannot(plain_folder: Path, quantization: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_on_card(plain_folder, quantization)


@pytest.mark.usefixtures("card")
def test_a_card_refuses_weights_rounded_for_the_cpu(saved: tuple[str, Path]) -> None:
    quantization, folder = saved
    with pytest.raises(ConfigError, match=f"holds {quantization} weights, which are for the CPU"):
        load_on_card(folder, None)


def load_on_card(folder: Path, quantization: str | None) -> SpeechModel:
    return load_model(
        folder, device="cuda", dtype="float16", max_model_len=16, quantization=quantization
    )


def test_the_cpu_refuses_fp8(plain_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"on CUDA only; .* int8"):
        load_model(plain_folder, max_model_len=16, quantization="fp8")


def test_fp8_weights_diverge_less_than_int4_ones(plain_folder: Path) -> None:
    """In torch, which computes on a CPU what a card would, in float32."""
    exact, int4 = (
        load_model(plain_folder, max_model_len=64, quantization=each) for each in (None, "int4")
    )
    fp8 = HiggsAudioModel.from_folder(
        plain_folder,
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_model_len=64,
        with_text_head=False,
        quantization=WeightFormat.FP8,
    )
    found, other = (
        measure_divergence(exact, model, torch.arange(9), num_frames=12) for model in (fp8, int4)
    )
    assert 1e-3 < found.logit_error < min(0.2, other.logit_error)
    assert found.sample_agreement > 0.6


def test_somebody_elses_quantisation_is_refused(plain_folder: Path, tmp_path: Path) -> None:
    config = json.loads((plain_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'awq' are not supported"):
        load_model(tmp_path, max_model_len=16)


def test_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="--quantization 'int3': int8, int4 or fp8"):
        ModelConfig(quantization="int3")  # type: ignore[arg-type]
