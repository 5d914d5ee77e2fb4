import numpy as np
import pytest
import torch

from training.corpus import Corpus
from training.features import FRAME
from training.train_decoder import Crops, ends_loss

NUM_FRAMES = 40
NUM_CLOSE = 64  # samples next to an end


@pytest.fixture(scope="module")
def crops():
    """Of one utterance, whose first code counts the frames, and of one that is never trained on."""
    codes = np.zeros((2 * NUM_FRAMES, 8), np.int16)
    codes[NUM_FRAMES:, 0] = np.arange(NUM_FRAMES)
    corpus = Corpus(
        codes=codes,
        frame_offsets=np.array([0, NUM_FRAMES, 2 * NUM_FRAMES]),
        symbols=np.zeros(2, np.uint8),
        symbol_offsets=np.array([0, 1, 2]),
        durations=np.zeros(6, np.uint8),
        samples=np.zeros(2 * NUM_FRAMES * FRAME, np.uint8),
        num_heard=2,
        num_validation=1,
        texts=["unheard"],
    )
    codebooks = torch.zeros(8, NUM_FRAMES, 1)
    codebooks[0, :, 0] = torch.arange(NUM_FRAMES)
    return Crops(corpus, codebooks, seed=0)


def test_ends_of_utterances_are_marked_where_they_are(crops):
    vectors, samples, is_end = next(crops.batches(64))
    assert samples.shape == is_end.shape == (64, vectors.shape[-1] * FRAME)
    first, last = vectors[:, 0, 0], vectors[:, 0, -1]
    assert 10 < int((first == 0).sum() + (last == NUM_FRAMES - 1).sum()) < 50
    for at_begin, at_end, marks in zip(first == 0, last == NUM_FRAMES - 1, is_end, strict=True):
        assert bool(marks[:NUM_CLOSE].all()) == bool(marks[0]) == bool(at_begin)
        assert bool(marks[-NUM_CLOSE:].all()) == bool(marks[-1]) == bool(at_end)
        assert not marks[NUM_CLOSE:-NUM_CLOSE].any()


def test_only_ends_cost_something(crops):
    _, samples, is_end = next(crops.batches(8))
    assert ends_loss(samples + 0.5 * is_end, samples, is_end) == pytest.approx(0.5)
    assert ends_loss(samples + 1 - is_end, samples, is_end) == 0
    assert ends_loss(samples + 1, samples, torch.zeros_like(is_end)) == 0
