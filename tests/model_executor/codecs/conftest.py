"""Tiny codec checkpoints in both layouts."""

from pathlib import Path

import pytest

from vllm.checkpoints.make_codec import make_codec
from vllm.model_executor.codecs import load_codec


@pytest.fixture(scope="session")
def codec_folders(tmp_path_factory) -> dict[str, Path]:
    """layout -> folder of the same tiny codec."""
    root = tmp_path_factory.mktemp("codecs")
    for layout in ("transformers", "boson"):
        make_codec(root / layout, layout=layout, size="tiny", seed=7)
    make_codec(root / "decode_only", layout="transformers", size="tiny", seed=7, decode_only=True)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="session")
def codec(codec_folders):
    return load_codec(codec_folders["transformers"], device="cpu")


@pytest.fixture(scope="session")
def reference(reference_codec_class, codec_folders):
    return reference_codec_class.from_pretrained(codec_folders["transformers"]).eval()
