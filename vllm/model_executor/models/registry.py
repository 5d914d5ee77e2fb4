"""Architecture name -> model class, imported when asked for.

Holds dotted names only, so that knowing a model costs no import.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from vllm.exceptions import CheckpointError, ConfigError
from vllm.kernels.quantize import WeightFormat
from vllm.model_executor.models.interface import SpeechModel
from vllm.model_executor.weights import read_config, saved_quantization
from vllm.platforms import Platform, resolve_dtype

__all__ = ["check_architecture", "load_model"]

_HIGGS_AUDIO = "vllm.model_executor.models.higgs_audio:HiggsAudioModel"

# A configuration names its architecture or, failing that, its model type.
_MODELS = {
    "HiggsAudioModel": _HIGGS_AUDIO,
    "HiggsAudioV2ForConditionalGeneration": _HIGGS_AUDIO,
    "higgs_audio": _HIGGS_AUDIO,
    "higgs_audio_v2": _HIGGS_AUDIO,
}

_FP8_CAPABILITY = 89  # cards before it cannot turn e4m3 into other numbers


def check_architecture(folder: Path) -> None:
    """Raises CheckpointError unless the model of a checkpoint folder is one of those known."""
    _model_class_name(read_config(folder), folder)


def _model_class_name(config: Mapping[str, Any], folder: Path) -> str:
    """``module:class`` of the model that a configuration names."""
    names = [*(config.get("architectures") or []), config.get("model_type")]
    dotted = next((_MODELS[name] for name in names if name in _MODELS), None)
    if dotted is None:
        raise CheckpointError(
            f"{folder}: architecture {names} is not supported; known are {', '.join(_MODELS)}"
        )
    return dotted


def load_model(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    max_model_len: int = 8192,
    with_text_head: bool = False,
    quantization: str | None = None,
) -> SpeechModel:
    """Load the model of a checkpoint folder, ready for inference.

    Args:
        folder: local checkpoint, see ``weights.resolve``.
        device: where the weights live.
        dtype: float32, bfloat16, float16, or auto for the device's own.
        max_model_len: longest sequence in positions; sizes the rotary tables.
        with_text_head: keep the text head, which only sampling of text needs.
        quantization: int8 or int4 for float32 on the CPU, int8 or fp8 on CUDA; None is as the
            checkpoint was saved.

    Raises:
        CheckpointError: unknown architecture, bad configuration, or tensors that do not fit it.
        ConfigError: the weights cannot be quantised as asked for.
    """
    config = read_config(folder)
    module, _, name = _model_class_name(config, folder).partition(":")
    model_class: type[SpeechModel] = getattr(import_module(module), name)
    target = torch.device(device)
    resolved = resolve_dtype(dtype, Platform(target))
    weight_format = _weight_format(config, quantization, folder)
    if weight_format is not None:
        is_saved = saved_quantization(config, folder) is not None
        _check_can_quantize(weight_format, Platform(target), resolved, is_saved=is_saved)
    return model_class.from_folder(
        folder,
        device=target,
        dtype=resolved,
        max_model_len=max_model_len,
        with_text_head=with_text_head,
        quantization=weight_format,
    )


def _weight_format(
    config: Mapping[str, Any], wanted: str | None, folder: Path
) -> WeightFormat | None:
    """What the weights become: as wanted, or else as the checkpoint was saved."""
    saved = saved_quantization(config, folder)
    if saved is not None and wanted not in (None, saved):
        raise ConfigError(
            f"--quantization {wanted}: {folder} holds {saved} weights; take the checkpoint that "
            "they were made from"
        )
    name = wanted or saved
    return None if name is None else WeightFormat(name)


def _check_can_quantize(
    weight_format: WeightFormat, platform: Platform, dtype: torch.dtype, *, is_saved: bool
) -> None:
    capability = platform.compute_capability
    if capability is None:
        if weight_format is WeightFormat.FP8:
            raise ConfigError("fp8 weights run on CUDA only; on the CPU, take --quantization int8")
        if dtype != torch.float32:
            raise ConfigError(f"{weight_format} weights compute in float32; leave --dtype out")
        return
    if is_saved:
        # What was rounded would be rounded once more, to the type of the model.
        raise ConfigError(
            f"the checkpoint holds {weight_format} weights, which are for the CPU; on CUDA take the "
            "one that they were made from, and --quantization int8 or fp8"
        )
    if weight_format is WeightFormat.INT4:
        raise ConfigError("int4 weights run on the CPU only; on CUDA, take --quantization fp8")
    if weight_format is WeightFormat.FP8 and capability < _FP8_CAPABILITY:
        raise ConfigError(
            f"fp8 weights need compute capability 8.9, and this card has {capability / 10:.1f}; "
            "take --quantization int8"
        )
