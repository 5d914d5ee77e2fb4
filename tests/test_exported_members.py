"""Every ``__all__`` tells the truth, and the public names of the package do not change by accident."""

from __future__ import annotations

import ast
import importlib
import pkgutil

import pytest

import vllm

PUBLIC_NAMES = {
    "LLM",
    "AsyncLLM",
    "FinishReason",
    "SamplingParams",
    "SpeechOutput",
    "SpeechPrompt",
    "SpeechStats",
    "Usage",
    "__version__",
}
# The nine import paths that users and sibling projects rely on.
PUBLIC_MODULES = {
    "vllm.sampling_params": "SamplingParams",
    "vllm.model_executor.models.higgs_audio": None,
    "vllm.v1.sample.metadata": "SamplingMetadata",
    "vllm.v1.sample.sampler": "Sampler",
    "vllm.v1.worker.gpu_model_runner": "GPUModelRunner",
    "vllm.v1.worker.gpu_input_batch": "InputBatch",
    "vllm.entrypoints.openai.protocol": "AudioSpeechRequest",
    "vllm.entrypoints.bosonai.api_server": "build_app",
    "vllm.entrypoints.bosonai.serving_audio": "ServingAudio",
}


def _is_importable(name: str) -> bool:
    return not name.endswith(".__main__") and ".triton" not in name


MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(vllm.__path__, "vllm.")
    if _is_importable(module.name)
)


@pytest.mark.parametrize("name", ["vllm", *MODULES])
def test_exported_names_exist_once(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    missing = [member for member in exported if not hasattr(module, member)]
    assert not missing


@pytest.mark.parametrize("name", MODULES)
def test_a_modules_own_definitions_are_private_or_exported(name: str) -> None:
    module = importlib.import_module(name)
    if not hasattr(module, "__all__"):
        return
    assert module.__file__ is not None
    with open(module.__file__, encoding="utf-8") as source:
        body = ast.parse(source.read()).body
    defined = {
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    }
    assert defined <= set(module.__all__)


def test_public_names_of_the_package() -> None:
    assert set(vllm.__all__) == PUBLIC_NAMES


@pytest.mark.parametrize(("name", "member"), PUBLIC_MODULES.items())
def test_public_modules_keep_their_place(name: str, member: str | None) -> None:
    module = importlib.import_module(name)
    assert member is None or hasattr(module, member)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        vllm.Nothing  # noqa: B018
