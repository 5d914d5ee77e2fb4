"""Recutting of a sample stream into blocks of one size.

Codecs and filters whose output could depend on how their input was cut get their samples through
here; knows nothing of what the samples are for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["BlockBuffer"]


class BlockBuffer:
    """Collects samples and hands them out in blocks of ``size``."""

    def __init__(self, size: int) -> None:
        assert size > 0
        self.size = size
        self._pending = np.zeros(0, np.float32)  # [< size]

    def push(self, samples: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Add samples [n]; return every block [size] that is now complete."""
        assert samples.ndim == 1, f"mono samples wanted, got shape {samples.shape}"
        joined = np.concatenate([self._pending, samples], dtype=np.float32)
        end = len(joined) - len(joined) % self.size
        self._pending = joined[end:]
        return [joined[start : start + self.size] for start in range(0, end, self.size)]

    def flush(self) -> NDArray[np.float32]:
        """What is left over, [0..size - 1] samples; the buffer is empty afterwards."""
        rest, self._pending = self._pending, np.zeros(0, np.float32)
        return rest
