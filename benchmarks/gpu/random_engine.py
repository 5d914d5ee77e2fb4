"""The engine itself over random weights that are made on the device in seconds, never on a disk.

Its speed does not depend on what the weights are, as long as they are not zeros. Streams never end
by themselves, so every request makes exactly as many frames as it is told to.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks._engine import NullCodecRunner
from benchmarks.gpu.suite import Scale, Suite
from vllm.checkpoint_config import HiggsAudioConfig
from vllm.checkpoints.make_codec import make_codec
from vllm.checkpoints.make_model import make_model, random_tensors
from vllm.config import EngineConfig
from vllm.model_executor.heads import codebooks
from vllm.model_executor.models import higgs_audio
from vllm.outputs import FinishReason
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.messages import ClipData, EngineCoreRequest
from vllm.v1.worker import worker as worker_module

__all__ = [
    "FP8_OPTIONS",
    "drawn_weights",
    "make_core",
    "make_request",
    "open_core",
    "runner_of",
    "write_folder",
]

_NEVER = 2**40
_FIRST_ID, _NUM_IDS = 100, 90  # of ordinary tokens in every vocabulary that we make
FP8_OPTIONS = {"quantization": "fp8", "kv_cache_dtype": "fp8"}


def write_folder(folder: Path, scale: Scale) -> HiggsAudioConfig:
    """Configuration and tokenizer of a model without weights, and a whole codec, to ``folder``."""
    make_codec(folder / "codec", layout="transformers", size=scale.codec, seed=0, decode_only=True)
    return make_model(folder / "lm", layout="transformers", size=scale.model, with_weights=False)


def make_core(suite: Suite, *, decodes_audio: bool, **options: Any) -> EngineCore:
    """A warm engine.

    Args:
        suite: says where, and of which size.
        decodes_audio: without it what is left is the language model's work alone.
        options: of ``EngineConfig``, on top of the suite's.

    Raises:
        ConfigError: an option is not there, or does not suit.
    """
    defaults: dict[str, Any] = {
        "model": str(suite.folder / "lm"),
        "audio_tokenizer_type": str(suite.folder / "codec"),
        "device": suite.device.type,
        "dtype": str(suite.scale.dtype).removeprefix("torch."),
        "max_model_len": suite.scale.max_model_len,
        "max_silence_seconds": 0.0,
    }
    config = EngineConfig.from_options(**defaults | options)
    endless = {"strict": (0, _NEVER, 0, _NEVER, _NEVER, 0)}
    runner = worker_module.CodecRunner if decodes_audio else NullCodecRunner
    with (
        drawn_weights(suite),
        mock.patch.dict(codebooks._STARTS, endless),
        mock.patch.object(worker_module, "CodecRunner", runner),
        # On a CPU too, so that toy sizes run what cards run.
        mock.patch.object(worker_module, "_decodes_on_device", return_value=True),
    ):
        return EngineCore(config)


@contextmanager
def open_core(suite: Suite, *, decodes_audio: bool, **options: Any) -> Iterator[EngineCore]:
    """An engine as of ``make_core``, closed again and out of memory afterwards."""
    core = make_core(suite, decodes_audio=decodes_audio, **options)
    try:
        yield core
    finally:
        core.shutdown()
        # Whoever opened it has names for these still, and the next engine needs their memory.
        for each in (runner_of(core), core._executor._worker):  # type: ignore[attr-defined]
            vars(each).clear()
        gc.collect()
        if suite.is_cuda:
            torch.cuda.empty_cache()


@contextmanager
def drawn_weights(suite: Suite) -> Iterator[None]:
    """Whatever model is loaded meanwhile gets weights that are drawn where it is."""

    def drawn(_: Path) -> Iterator[tuple[str, torch.Tensor]]:
        return random_tensors(suite.config, device=suite.device)

    with mock.patch.object(higgs_audio, "iter_tensors", drawn):
        yield


def runner_of(core: EngineCore) -> Any:
    """What executes the steps of an engine, for plans that no scheduler made."""
    return core._executor._worker._runner  # type: ignore[attr-defined]


def make_request(
    suite: Suite,
    request_id: str,
    *,
    num_positions: int,
    num_frames: int,
    seed: int = 0,
    voice: int | None = None,
    num_new: int = 60,
    params: SamplingParams | None = None,
) -> EngineCoreRequest:
    """A request whose prompt is half text and half a voice, as cloning has it.

    Args:
        suite: of which model.
        request_id: of the request.
        num_positions: of its prompt.
        num_frames: delayed frames that it makes.
        seed: of the draws, and of the text.
        voice: number of the voice. Prompts of equal voice and length are equal but for the text in
            the last ``num_new`` positions; None is a voice of its own.
        num_new: positions of text behind the voice.
        params: sampling; default: the default.
    """
    config = suite.config
    num_new = min(num_new, num_positions // 3)
    num_delayed = (num_positions - num_new) // 2
    num_clip = max(num_delayed - config.num_codebooks - 1, 1)
    num_delayed = num_clip + config.num_codebooks + 1
    num_before = num_positions - num_new - num_delayed
    own = np.random.default_rng(1_000_000 + seed)
    shared = own if voice is None else np.random.default_rng(voice)
    before = shared.integers(_FIRST_ID, _FIRST_ID + _NUM_IDS, num_before)
    codes = shared.integers(0, config.stream_bos_id, (config.num_codebooks, num_clip))
    after = own.integers(_FIRST_ID, _FIRST_ID + _NUM_IDS, num_new)
    ids = np.concatenate([before, np.full(num_delayed, config.audio_token_id), after])
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=ids.astype(np.int32).tobytes(),
        sampling_params=params or SamplingParams(),
        seed=seed,
        frame_limit=num_frames,
        limit_reason=FinishReason.LENGTH,
        clips=(ClipData(num_before, num_clip, codes=codes.astype(np.int16).tobytes()),),
    )
