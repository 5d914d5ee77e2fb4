"""Repetition aware sampling (RAS): codes that fill the recent past are drawn anew or masked.

The window is one of delayed frames, per codebook, of generated frames only; BOS and EOS in it do
not count. Rule: the published reference for ``"redraw"``; ``"block"`` is the plain ban that the
fork's users know.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm.kernels.repetition import count_in_window, mask_repeated
from vllm.v1.sample.ops.seeded import draw

__all__ = ["RasParams", "apply_ras_penalty", "ras_params", "redraw_repeated"]


@dataclass(frozen=True)
class RasParams:
    """Windows and limits of the rows of one step that share a mode."""

    max_window: int  # widest window of any row
    window: Tensor  # [num_rows] int64, frames to look at; 0: off
    repeats: Tensor  # [num_rows] int64, occurrences that are too many


def ras_params(
    window: NDArray[np.int64],
    repeats: NDArray[np.int64],
    applies: NDArray[np.bool_],
    device: torch.device,
) -> RasParams | None:
    """Parameters of one step from the settings of each row [num_rows]; None if no row needs them.

    A row is off where ``applies`` is False and where ``window`` or ``repeats`` is 0.
    """
    window = np.where(applies & (repeats > 0), window, 0)
    if not window.any():
        return None
    return RasParams(
        max_window=int(window.max()),
        window=torch.from_numpy(window).to(device),
        repeats=torch.from_numpy(repeats.astype(np.int64)).to(device),
    )


def apply_ras_penalty(logits: Tensor, history: Tensor | None, params: RasParams | None) -> Tensor:
    """Mask codes that occur too often (``--ras-mode block``); EOS is never among them.

    Args:
        logits: float32 [num_rows, num_codebooks, vocab_size].
        history: int16 [num_rows, width, num_codebooks], newest first, -1 where BOS or EOS was.
        params: rows in this mode; None: no row.
    """
    if params is None or history is None:
        return logits
    history = history[:, : params.max_window]
    return mask_repeated(logits, history, params.window, params.repeats)


def redraw_repeated(
    codes: Tensor, logits: Tensor, noise: Tensor, history: Tensor, params: RasParams
) -> Tensor:
    """Draw codes that occur too often once more, from the plain softmax.

    Without temperature, top-k and top-p, whatever the first draw had; the result stands even if
    it repeats again. BOS and EOS are never counted, so they are never drawn anew.

    Args:
        codes: int64 [num_rows, num_codebooks], the first draw.
        logits: float32 [num_rows, num_codebooks, vocab_size], -inf at codes not allowed.
        noise: float32 [num_rows, num_codebooks] in [0, 1).
        history: int16 [num_rows, width, num_codebooks], newest first, -1 where BOS or EOS was.
        params: rows in this mode.
    """
    count = count_in_window(codes, history[:, : params.max_window], params.window)
    is_repeated = (count >= params.repeats[:, None]) & (params.window > 0)[:, None]
    return torch.where(is_repeated, draw(logits.softmax(-1), noise), codes)
