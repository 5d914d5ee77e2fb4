"""Architecture name -> model class, imported when asked for.

Holds dotted names only, so that knowing a model costs no import.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from vllm.exceptions import CheckpointError
from vllm.model_executor.models.interface import SpeechModel
from vllm.model_executor.weights import read_config
from vllm.platforms import Platform, resolve_dtype

__all__ = ["load_model", "supported_architectures"]

_HIGGS_AUDIO = "vllm.model_executor.models.higgs_audio:HiggsAudioModel"

# A configuration names its architecture or, failing that, its model type.
_MODELS = {
    "HiggsAudioModel": _HIGGS_AUDIO,
    "HiggsAudioV2ForConditionalGeneration": _HIGGS_AUDIO,
    "higgs_audio": _HIGGS_AUDIO,
    "higgs_audio_v2": _HIGGS_AUDIO,
}


def supported_architectures() -> tuple[str, ...]:
    """Names that ``config.json`` may hold as ``architectures`` or ``model_type``."""
    return tuple(_MODELS)


def load_model(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    max_model_len: int = 8192,
    with_text_head: bool = False,
) -> SpeechModel:
    """Load the model of a checkpoint folder, ready for inference.

    Args:
        folder: local checkpoint, see ``weights.resolve``.
        device: where the weights live.
        dtype: float32, bfloat16, float16, or auto for the device's own.
        max_model_len: longest sequence in positions; sizes the rotary tables.
        with_text_head: keep the text head, which only sampling of text needs.

    Raises:
        CheckpointError: unknown architecture, bad configuration, or tensors that do not fit it.
    """
    config = read_config(folder)
    names = [*(config.get("architectures") or []), config.get("model_type")]
    dotted = next((_MODELS[name] for name in names if name in _MODELS), None)
    if dotted is None:
        raise CheckpointError(
            f"{folder}: architecture {names} is not supported; known are {', '.join(_MODELS)}"
        )
    module, _, name = dotted.partition(":")
    model_class: type[SpeechModel] = getattr(import_module(module), name)
    target = torch.device(device)
    return model_class.from_folder(
        folder,
        device=target,
        dtype=resolve_dtype(dtype, Platform(target)),
        max_model_len=max_model_len,
        with_text_head=with_text_head,
    )
