"""Architecture name -> prompt builder, imported when asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from vllm.exceptions import CheckpointError
from vllm.prompts.interface import PromptBuilder

__all__ = ["load_prompt_builder"]

_HIGGS_AUDIO = "vllm.prompts.higgs_audio:HiggsAudioPromptBuilder"

_BUILDERS = {
    "HiggsAudioModel": _HIGGS_AUDIO,
    "HiggsAudioV2ForConditionalGeneration": _HIGGS_AUDIO,
}


class _BuilderClass(Protocol):
    def from_folder(self, model_folder: Path, tokenizer_folder: Path) -> PromptBuilder: ...


def load_prompt_builder(
    architecture: str, *, model_folder: Path, tokenizer_folder: Path
) -> PromptBuilder:
    """Builder for a model, from the configuration and tokenizer of its checkpoint.

    Raises:
        CheckpointError: unknown architecture, or files that do not fit it.
    """
    dotted = _BUILDERS.get(architecture)
    if dotted is None:
        raise CheckpointError(
            f"no prompt builder for architecture {architecture!r}; known are {', '.join(_BUILDERS)}"
        )
    module, _, name = dotted.partition(":")
    builder_class = cast(_BuilderClass, getattr(import_module(module), name))
    return builder_class.from_folder(model_folder, tokenizer_folder)
