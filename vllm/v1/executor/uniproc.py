"""One worker in this process: a CPU or one GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm.config import EngineConfig
from vllm.v1.core.sched_output import SchedulerOutput
from vllm.v1.outputs import CodecStats, ModelRunnerOutput
from vllm.v1.worker import Worker, WorkerInfo

__all__ = ["UniProcExecutor"]


class UniProcExecutor:
    """Passes every call on to its only worker."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        model_folder: Path,
        codec_folder: Path,
        clip_cache_folder: Path | None,
    ) -> None:
        self._worker = Worker(
            config,
            model_folder=model_folder,
            codec_folder=codec_folder,
            clip_cache_folder=clip_cache_folder,
        )

    @property
    def info(self) -> WorkerInfo:
        return self._worker.info

    def execute_model(self, plan: SchedulerOutput, *, wait_s: float = 0.0) -> ModelRunnerOutput:
        return self._worker.execute_model(plan, wait_s=wait_s)

    def encode_clip(self, key: str, samples: NDArray[np.float32]) -> None:
        self._worker.encode_clip(key, samples)

    def has_codec_work(self) -> bool:
        return self._worker.has_codec_work()

    def codec_stats(self) -> CodecStats:
        return self._worker.codec_stats()

    def reset_codec_stats(self) -> None:
        self._worker.reset_codec_stats()

    def check_integrity(self) -> None:
        self._worker.check_integrity()

    def shutdown(self) -> None:
        self._worker.shutdown()
