"""What the engine core asks of its workers, however many there are and wherever they run."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vllm.v1.core.sched_output import SchedulerOutput
from vllm.v1.outputs import CodecStats, ModelRunnerOutput
from vllm.v1.worker import WorkerInfo

__all__ = ["Executor"]


class Executor(Protocol):
    """Workers behind one set of calls."""

    @property
    def info(self) -> WorkerInfo: ...

    def execute_model(self, plan: SchedulerOutput, *, wait_s: float = 0.0) -> ModelRunnerOutput:
        """Run one step on every rank; an idle one may wait ``wait_s`` for the codec."""
        ...

    def encode_clip(self, key: str, samples: NDArray[np.float32]) -> None:
        """Queue a reference clip, float32 [num_samples]; codes come with a later output."""
        ...

    def has_codec_work(self) -> bool:
        """Whether audio or codes will come without another step of the model."""
        ...

    def codec_stats(self) -> CodecStats:
        """What the codec has done since ``reset_codec_stats``."""
        ...

    def reset_codec_stats(self) -> None:
        """Count the codec's work from zero again."""
        ...

    def check_integrity(self) -> None:
        """Assert that every row has one owner."""
        ...

    def shutdown(self) -> None:
        """Stop the workers; nothing may be called afterwards."""
        ...
