"""Counting and masking of codes in hand-made windows."""

import math

import torch

from vllm.kernels.repetition import count_in_window, mask_repeated

# Newest first, two codebooks.
HISTORY = torch.tensor([[[5, 1], [5, 2], [3, 1], [5, -1]]], dtype=torch.int16)


def test_counts_only_within_the_window_of_its_codebook():
    codes = torch.tensor([[5, 1]])
    counts = [count_in_window(codes, HISTORY, torch.tensor([w])).tolist() for w in range(5)]
    assert counts == [[[0, 0]], [[1, 1]], [[2, 1]], [[2, 2]], [[3, 2]]]


def test_masks_codes_at_the_limit_and_no_others():
    masked = mask_repeated(torch.zeros(1, 2, 8), HISTORY, torch.tensor([3]), torch.tensor([2]))
    banned = (masked == -math.inf).nonzero().tolist()
    assert banned == [[0, 0, 5], [0, 1, 1]]


def test_window_zero_masks_nothing():
    logits = torch.randn(1, 2, 8)
    assert torch.equal(mask_repeated(logits, HISTORY, torch.tensor([0]), torch.tensor([1])), logits)


def test_never_masks_the_last_code():
    logits = torch.zeros(1, 1, 2)
    history = torch.tensor([[[0], [1]]], dtype=torch.int16)
    assert torch.equal(mask_repeated(logits, history, torch.tensor([2]), torch.tensor([1])), logits)
