"""Tiny codec checkpoints, and transformers' codec as the reference, torchaudio left out."""

import importlib.machinery
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from vllm.checkpoints.make_codec import make_codec
from vllm.model_executor.codecs import load_codec


def _reference_resample(waveform, orig_freq, new_freq):
    """torchaudio.functional.resample by its published formula, one output sample at a time."""
    common = math.gcd(orig_freq, new_freq)
    source, target = orig_freq // common, new_freq // common
    cutoff = min(source, target) * 0.99
    width = math.ceil(6 * source / cutoff)
    num_out = math.ceil(waveform.shape[-1] * target / source)
    padded = torch.nn.functional.pad(waveform.double(), (width, width + source))
    columns = []
    for index in range(num_out):
        step, phase = divmod(index, target)
        taps = torch.arange(-width, width + source, dtype=torch.float64) / source
        time = ((taps - phase / target) * cutoff).clamp(-6, 6)
        window = torch.cos(time * math.pi / 12) ** 2
        kernel = torch.where(time == 0, 1.0, torch.sin(time * math.pi) / (time * math.pi))
        kernel = torch.nan_to_num(kernel, nan=1.0) * window * cutoff / source
        first = step * source
        columns.append((padded[..., first : first + len(kernel)] * kernel).sum(-1))
    return torch.stack(columns, -1).to(waveform.dtype)


@pytest.fixture(scope="session")
def reference_resample():
    return _reference_resample


@pytest.fixture(scope="session")
def reference_codec_class():
    """transformers' codec class, with a stand-in for the one torchaudio function that it calls."""
    if "torchaudio" not in sys.modules:
        stub = types.ModuleType("torchaudio")
        stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        stub.__version__ = "2.0.0"
        stub.functional = types.SimpleNamespace(resample=_reference_resample)
        sys.modules["torchaudio"] = stub
    from transformers.models.higgs_audio_v2_tokenizer import modeling_higgs_audio_v2_tokenizer
    from transformers.utils import import_utils

    import_utils.is_torchaudio_available.cache_clear()
    backends = import_utils.BACKENDS_MAPPING
    backends["torchaudio"] = (lambda: True, backends["torchaudio"][1])
    modeling_higgs_audio_v2_tokenizer.torchaudio = sys.modules["torchaudio"]
    return modeling_higgs_audio_v2_tokenizer.HiggsAudioV2TokenizerModel


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
