"""An engine core for measurements, with or without its codec, and requests for it.

Without the codec, what is left is the language model's work alone, which is all that a peer's
``generate`` does. Knows nothing of what is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm.config import EngineConfig
from vllm.outputs import FinishReason
from vllm.player import Listener
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.messages import EngineCoreRequest
from vllm.v1.outputs import AudioChunk, CodecStats
from vllm.v1.worker import worker as worker_module
from vllm.v1.worker.codec_runner import CodecResults

__all__ = ["PROMPT_LEN", "make_core", "make_request", "run_to_end"]

PROMPT_LEN = 90  # positions, about those of a sentence with its template
_FIRST_ID = 100  # of an ordinary token in every vocabulary that we make
_NUM_IDS = 90


class NullCodecRunner:
    """In the place of ``CodecRunner``: takes every frame and answers with no samples."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._chunks: list[AudioChunk] = []

    def open(
        self, request_id: str, *, max_silence_frames: int | None, listener: Listener | None = None
    ) -> None:
        pass

    def push(self, request_id: str, frames: NDArray[np.int16], *, final: bool) -> None:
        if final:
            empty = np.empty(0, np.float32)
            self._chunks.append(AudioChunk(request_id, empty, 0, final=True))

    def next_due(self, num_frames: int) -> int:
        return num_frames + 25

    def close(self, request_id: str) -> None:
        pass

    def poll(self, timeout_s: float = 0.0) -> CodecResults:
        chunks, self._chunks = self._chunks, []
        return CodecResults(chunks, [])

    def has_work(self) -> bool:
        return bool(self._chunks)

    def stats(self) -> CodecStats:
        return CodecStats()

    def reset_stats(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def make_core(checkpoint: Path, *, decodes_audio: bool, **options: Any) -> EngineCore:
    """A warm engine over ``checkpoint/lm`` and ``checkpoint/codec`` on the CPU."""
    defaults: dict[str, Any] = {
        "model": str(checkpoint / "lm"),
        "audio_tokenizer_type": str(checkpoint / "codec"),
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 512,
        "kv_cache_memory": 1 << 30,
    }
    config = EngineConfig.from_options(**defaults | options)
    real = worker_module.CodecRunner
    if not decodes_audio:
        worker_module.CodecRunner = NullCodecRunner  # type: ignore[assignment,misc]
    try:
        return EngineCore(config)
    finally:
        worker_module.CodecRunner = real  # type: ignore[misc]


def make_request(
    request_id: str, *, num_frames: int, prompt_len: int = PROMPT_LEN, seed: int = 0, **params: Any
) -> EngineCoreRequest:
    """A request over plain text that makes ``num_frames`` delayed frames unless EOS comes first.

    Prompts differ in their first id, so that no two share a prefix.
    """
    ids = _FIRST_ID + (seed + np.arange(prompt_len)) % _NUM_IDS
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=ids.astype(np.int32).tobytes(),
        sampling_params=SamplingParams(**params),
        seed=seed,
        frame_limit=num_frames,
        limit_reason=FinishReason.LENGTH,
    )


def run_to_end(core: EngineCore, requests: list[EngineCoreRequest]) -> int:
    """Serve all requests; returns the delayed frames made.

    Raises:
        RuntimeError: a request failed, so its time would mean nothing.
    """
    for request in requests:
        core.add_request(request)
    num_bytes = 0
    while core.has_work():
        for output in core.step().outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            num_bytes += len(output.delayed_codes)
    return num_bytes // (2 * core.info.num_codebooks)
