"""Which class loads which codec checkpoint, imported only when asked for.

Knows names in configuration files; sizes and tensors are each codec's own business.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm.exceptions import CheckpointError
from vllm.model_executor.weights import read_config

if TYPE_CHECKING:
    from vllm.model_executor.codecs.interface import Codec

__all__ = ["is_codec", "load_codec"]

# model_type -> (module, class)
_CODECS: dict[str, tuple[str, str]] = {
    "higgs_audio_v2_tokenizer": ("vllm.model_executor.codecs.higgs", "HiggsCodec"),
}


def is_codec(folder: Path) -> bool:
    """Whether the configuration in ``folder`` is that of a codec; CheckpointError without one."""
    config = read_config(folder)
    try:
        _model_type(config, folder)
    except CheckpointError:
        return False
    return True


def load_codec(
    folder: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    uses_kernels: bool = True,
) -> Codec:
    """Load the codec in a local folder.

    Args:
        folder: with configuration and weights.
        device: where it computes.
        dtype: of weights and activations; our own kernels are float32's alone.
        uses_kernels: decode with our own kernels where they are for the device; else with torch.

    Raises:
        CheckpointError: the codec is of no known kind, or its tensors do not fit its sizes; the
            message names every missing, surplus and misshapen one.
    """
    model_type = _model_type(read_config(folder), folder)
    module_name, class_name = _CODECS[model_type]
    codec_class = getattr(import_module(module_name), class_name)
    codec: Codec = codec_class.from_folder(
        folder, device=device, dtype=dtype, uses_kernels=uses_kernels
    )
    return codec


def _model_type(config: Mapping[str, Any], folder: Path) -> str:
    model_type = config.get("model_type")
    if model_type in _CODECS:
        return str(model_type)
    # NOTE: the original layout names no type; these fields occur together in it alone.
    if model_type is None and {"n_q", "bins", "ratios", "D"} <= config.keys():
        return "higgs_audio_v2_tokenizer"
    raise CheckpointError(
        f"{folder} is no known codec: model_type={model_type!r}; known are {', '.join(_CODECS)}"
    )
