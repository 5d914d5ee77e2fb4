"""Options and markers of the whole suite, and transformers' codec as a reference.

Builders live beside the tests that use them.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import math
import os
import random
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


# NOTE: Triton reads this where a kernel is decorated, its own ones when it is first imported, which
# other libraries do too. So it is set before any test module.
if not _has_cuda_driver():
    os.environ["TRITON_INTERPRET"] = "1"


if find_spec("hypothesis") is not None:  # not where only judges of speech are installed
    from hypothesis import HealthCheck, settings

    # The same examples in every run and on every machine, however slow. Others are drawn with
    # --hypothesis-profile=random.
    settings.register_profile(
        "fixed",
        deadline=None,
        derandomize=True,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.register_profile("random", settings.get_profile("fixed"), derandomize=False)
    settings.load_profile("fixed")

# What waits for processes, sockets or threads. The tests there are tried once more when they fail,
# and the first failure is shown; those that ran out of time are not, since the time is for both.
TRIED_AGAIN = (
    *("entrypoints", "v1/engine/test_async_llm.py", "benchmarks/test_soak.py", "test_docs.py"),
    "quality/test_over_http.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption(
        "--weights",
        type=Path,
        metavar="DIR",
        help="folder with the published checkpoints (DIR/lm, DIR/codec); runs the tests marked weights",
    )
    parser.addoption(
        "--whisper",
        type=Path,
        metavar="DIR",
        help="folder with Whisper for CTranslate2; runs the tests marked judged (scripts/judge tests)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not config.getoption("--slow"):
        skips["slow"] = pytest.mark.skip(reason="slow; needs --slow")
    if config.getoption("--weights") is None:
        skips["weights"] = pytest.mark.skip(reason="needs --weights DIR")
    if config.getoption("--whisper") is None:
        skips["judged"] = pytest.mark.skip(reason="needs --whisper DIR")
    if any("gpu" in item.keywords for item in items) and not _has_gpu():
        skips["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    tried_again = [Path(__file__).parent / place for place in TRIED_AGAIN]
    has_reruns = config.pluginmanager.hasplugin("rerunfailures")
    for item in items:
        if has_reruns and any(item.path.is_relative_to(place) for place in tried_again):
            item.add_marker(pytest.mark.flaky(reruns=1, rerun_except="from pytest-timeout"))
        for marker, skip in skips.items():
            if marker in item.keywords:
                item.add_marker(skip)


def _has_gpu() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers in a test, whichever ran before."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def weights_dir(request: pytest.FixtureRequest) -> Path:
    """Folder given with ``--weights``; only for tests marked ``weights``."""
    folder: Path = request.config.getoption("--weights")
    return folder


def _reference_resample(waveform: Any, orig_freq: int, new_freq: int) -> Any:
    """torchaudio.functional.resample by its published formula, one output sample at a time."""
    import torch

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
def reference_resample() -> Any:
    """Stand-in for ``torchaudio.functional.resample``."""
    return _reference_resample


@pytest.fixture(scope="session")
def reference_codec_class() -> Any:
    """transformers' codec class, with a stand-in for the one torchaudio function that it calls."""
    if "torchaudio" not in sys.modules:
        stub = types.ModuleType("torchaudio")
        stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        stub.__version__ = "2.0.0"
        stub.functional = types.SimpleNamespace(resample=_reference_resample)
        sys.modules["torchaudio"] = stub
    from transformers.utils import import_utils

    import_utils.is_torchaudio_available.cache_clear()
    backends = import_utils.BACKENDS_MAPPING
    backends["torchaudio"] = (lambda: True, backends["torchaudio"][1])
    # NOTE: by its full name, because the lazy package decided at its own import, which an earlier
    # test may have caused, that there is no torchaudio.
    module = importlib.import_module(
        "transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer"
    )
    return module.HiggsAudioV2TokenizerModel
