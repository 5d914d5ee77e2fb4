"""What a codec frame sounds like as one vector: spectrum, pitch and voicing of its 40 ms.

Analytic, so codes need no trained encoder: log-mel spectra of four sub-frames, log F0 and voicing.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["FRAME", "NUM_FEATURES", "frame_features", "mel_filters"]

FRAME = 960  # samples of a codec frame at 24 kHz
_RATE = 24000
_SUB = 240  # samples of a sub-frame
_PER_FRAME = FRAME // _SUB
_WINDOW = 1024
_NUM_MELS = 80
_FLOOR = 1e-4
_NEUTRAL_LOG_F0 = 5.2  # of an utterance without any voice
NUM_FEATURES = _PER_FRAME * (_NUM_MELS + 2)


def mel_filters(num_mels: int, window: int, rate: int = _RATE) -> Tensor:
    """Triangles on the mel scale, each of unit area in Hz, float32 [num_mels, window / 2 + 1]."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, num_mels + 2) / 2595) - 1)
    bins = np.linspace(0, rate / 2, window // 2 + 1)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    area = 2 / (edges[2:] - edges[:-2])
    return torch.tensor(triangles * area[:, None], dtype=torch.float32)


def frame_features(
    samples: NDArray[np.float32], f0: NDArray[np.float32], teacher_hop: int
) -> NDArray[np.float32]:
    """Samples [n], n a multiple of 960, and F0 per teacher frame -> float32 [n / 960, 328]."""
    num_frames = len(samples) // FRAME
    mel = _log_mel(torch.from_numpy(samples)).numpy()  # [4 * num_frames, 80]
    centres = ((np.arange(num_frames * _PER_FRAME) + 0.5) * _SUB / teacher_hop).astype(int)
    pitch = f0[np.minimum(centres, len(f0) - 1)]
    voiced = pitch > 0
    if voiced.any():
        known = np.flatnonzero(voiced)
        log_f0 = np.interp(np.arange(len(pitch)), known, np.log(pitch[known]))
    else:
        log_f0 = np.full(len(pitch), _NEUTRAL_LOG_F0)
    parts = (mel, log_f0, voiced)
    return np.concatenate([part.reshape(num_frames, -1) for part in parts], axis=1, dtype="f4")


def _log_mel(samples: Tensor) -> Tensor:
    padding = (_WINDOW - _SUB) // 2
    padded = torch.nn.functional.pad(samples, (padding, padding))
    window = torch.hann_window(_WINDOW)
    spectrum = torch.stft(
        padded, _WINDOW, _SUB, window=window, center=False, return_complex=True
    ).abs()
    return torch.log(_FILTERS @ spectrum + _FLOOR).T


_FILTERS = mel_filters(_NUM_MELS, _WINDOW)
