"""Sample rate conversion and downmix of whole clips.

Works on complete arrays; the streaming cases live with their encoder.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["downmix", "resample"]


def resample(samples: NDArray[np.float32], src_hz: int, dst_hz: int) -> NDArray[np.float32]:
    """Samples [n] at ``src_hz`` as [about n * dst_hz / src_hz] at ``dst_hz`` (soxr, HQ).

    Equal rates return the samples as they are, without loading soxr.
    """
    assert src_hz > 0, src_hz
    assert dst_hz > 0, dst_hz
    if src_hz == dst_hz or not len(samples):
        return samples
    import soxr

    return np.asarray(soxr.resample(samples, src_hz, dst_hz, quality="HQ"), np.float32)


def downmix(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean over the channels: [n, channels] to [n]."""
    return np.asarray(samples.mean(axis=1), np.float32)
