"""Counts of codes in a window of past frames, and masks made from them.

Works on windows that the caller has gathered; which rows want it, and what follows from a
count, is decided by ``v1.sample``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["count_in_window", "mask_repeated"]


def count_in_window(codes: Tensor, history: Tensor, window: Tensor) -> Tensor:
    """How often each code occurs in the last frames of its own codebook.

    Args:
        codes: int64 [num_rows, num_codebooks].
        history: [num_rows, width, num_codebooks], newest frame first, -1 where nothing counts.
        window: int64 [num_rows], frames to look at, at most ``width``.

    Returns:
        int64 [num_rows, num_codebooks].
    """
    same = history == codes[:, None, :]
    return (same & _inside(window, history.shape[1])[..., None]).sum(1)


def mask_repeated(logits: Tensor, history: Tensor, window: Tensor, repeats: Tensor) -> Tensor:
    """Logits with -inf at every code that occurs ``repeats`` times or more in its window.

    A codebook in which no code would be left is not masked.

    Args:
        logits: float32 [num_rows, num_codebooks, vocab_size].
        history: as in ``count_in_window``.
        window: int64 [num_rows], 0 for rows to leave alone.
        repeats: int64 [num_rows], at least 1 where ``window`` is not 0.
    """
    counted = (history >= 0) & _inside(window, history.shape[1])[..., None]
    same = (history[:, :, None] == history[:, None]) & counted[:, None]  # [num_rows, w, w, K]
    banned = counted & (same.sum(2) >= repeats[:, None, None])
    penalty = torch.zeros(banned.shape, device=banned.device).masked_fill_(banned, -math.inf)
    penalty = penalty.transpose(1, 2)
    codes = history.clamp(min=0).transpose(1, 2).long()
    masked = logits.scatter_add(-1, codes, penalty)
    is_empty = masked.amax(-1, keepdim=True) == -math.inf
    return torch.where(is_empty, logits, masked)


def _inside(window: Tensor, width: int) -> Tensor:
    """Bool [num_rows, width]: is this age within the row's window?"""
    return torch.arange(width, device=window.device) < window[:, None]
