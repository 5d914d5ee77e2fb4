import json

import numpy as np
import pytest
import torch

from training.alphabet import SYMBOLS
from training.batches import BOS, EOS, IGNORED, Batches, alignment, delay
from training.corpus import Corpus, compress, expand, said_sentences
from training.prompt import BETWEEN, FIRST_SYMBOL_ID, PREFIX, SUFFIX
from vllm.model_executor.framing import DelayPattern

NUM_VALIDATION = 2


@pytest.fixture
def corpus():
    rng = np.random.default_rng(0)
    num_frames, num_symbols = rng.integers(8, 20, 10), rng.integers(3, 9, 10)
    durations = [
        np.full(count + 2, 1 + 3 * frames // (count + 2), np.uint8)
        for frames, count in zip(num_frames, num_symbols, strict=True)
    ]
    heard = int(num_frames[:3].sum()) * 960
    return Corpus(
        codes=rng.integers(0, 1024, (num_frames.sum(), 8)).astype(np.int16),
        frame_offsets=np.cumsum([0, *num_frames]),
        symbols=rng.integers(0, len(SYMBOLS), num_symbols.sum()).astype(np.uint8),
        symbol_offsets=np.cumsum([0, *num_symbols]),
        durations=np.concatenate(durations),
        samples=compress(rng.uniform(-1, 1, heard).astype(np.float32)),
        num_heard=3,
        num_validation=NUM_VALIDATION,
        texts=["one .", "two ."],
    )


def test_a_corpus_survives_its_file(corpus, tmp_path):
    path = tmp_path / "corpus.safetensors"
    corpus.save(path)
    loaded = Corpus.load(path)
    assert len(loaded) == 10
    assert loaded.texts == corpus.texts
    for index in range(10):
        np.testing.assert_array_equal(loaded.codes_of(index), corpus.codes_of(index))
        assert len(loaded.durations_of(index)) == len(loaded.symbols_of(index)) + 2
    assert len(loaded.samples_of(2)) == 960 * len(loaded.codes_of(2))


def test_only_sentences_of_the_validation_shard_are_held_out(tmp_path):
    said = {"texts": ["good .", "this is a test ."], "kinds": ["word", "sentence"]}
    np.savez(tmp_path / "shard.npz", texts=np.array(json.dumps(said)))
    assert said_sentences(tmp_path / "shard.npz") == {"this is a test ."}


def test_eight_bits_keep_samples_to_within_a_few_percent():
    samples = np.linspace(-1, 1, 1001, dtype=np.float32)
    error = np.abs(expand(compress(samples)) - samples)
    assert error.max() < 0.025
    assert error[np.abs(samples) < 0.01].max() < 4e-4


def test_delayed_frames_are_those_of_the_engine():
    codes = np.arange(40).reshape(5, 8)
    pattern = DelayPattern(num_codebooks=8, bos=BOS, eos=EOS)
    np.testing.assert_array_equal(delay(codes), pattern.apply(codes.T))


def test_each_frame_is_read_from_the_symbols_that_sound_in_it():
    # 6.4 of the teacher's frames are two of the codec.
    shares = alignment(np.array([2, 1, 3, 1], np.uint8), 3)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(shares[0], [2 / 3.2, 1 / 3.2, 0.2 / 3.2, 0], atol=1e-6)
    np.testing.assert_allclose(shares[2], [0, 0, 0, 1], atol=1e-6)


def test_text_is_right_aligned_and_reading_points_into_it(corpus):
    batch = Batches(corpus, seed=0, damage=0.0).make([2, 3], damaged=False)
    width = batch.text.shape[1]
    for row, index in enumerate([2, 3]):
        symbols = corpus.symbols_of(index).astype(np.int64) + FIRST_SYMBOL_ID
        ids = [*PREFIX, *symbols.tolist(), *SUFFIX]
        padding = int(batch.num_padding[row])
        assert padding == width - len(ids)
        assert batch.text[row, padding:].tolist() == ids
        read = batch.reading[row].sum(0).nonzero().flatten()
        assert int(read.min()) == padding + len(PREFIX) - 1
        assert int(read.max()) == width - len(SUFFIX)


def test_positions_put_a_clip_between_its_text_and_the_other(corpus):
    batch = Batches(corpus, seed=0, damage=0.0).make([2, 3], references=[4, 5], damaged=False)
    num_text = batch.text.shape[1]
    for row, (index, other) in enumerate([(2, 4), (3, 5)]):
        clip = delay(corpus.codes_of(other))
        said, spoken = (
            (corpus.symbols_of(each).astype(np.int64) + FIRST_SYMBOL_ID).tolist()
            for each in (other, index)
        )
        prompt = [*PREFIX, *said, *SUFFIX, *[None] * len(clip), *BETWEEN, *spoken, *SUFFIX]
        begin = prompt.index(None)
        found = dict(
            zip(batch.positions[row].tolist(), range(len(batch.positions[row])), strict=True)
        )
        for place, token in enumerate(prompt):
            if token is not None:
                assert int(batch.text[row, found[place]]) == token
        slots = [found[begin + frame] - num_text for frame in range(len(clip))]
        np.testing.assert_array_equal(batch.frames[row, slots], clip)
        assert (batch.targets[row, slots] == IGNORED).all()
        first = found[len(prompt)] - num_text  # frame to speak, BOS
        assert (batch.frames[row, first] == BOS).all()
        assert int(batch.targets[row, first, 0]) == corpus.codes_of(index)[0, 0]
        read = batch.reading[row].sum(0).nonzero().flatten()
        assert int(read.max()) == num_text - len(SUFFIX)


def test_targets_are_the_next_frame_without_what_the_engine_dictates(corpus):
    batch = Batches(corpus, seed=0, damage=0.0).make([2], damaged=False)
    codes = torch.from_numpy(corpus.codes_of(2).astype(np.int64))
    targets = batch.targets[0]
    assert torch.equal(targets[: len(codes), 0], codes[:, 0])
    assert int(targets[len(codes), 0]) == EOS
    assert (targets[0, 1:] == IGNORED).all()
    assert torch.equal(targets[3:6, 3], codes[:3, 3])
    assert not (targets[:, 1:] == EOS).any()


def test_damage_changes_inputs_and_no_target(corpus):
    whole, damaged = (
        Batches(corpus, seed=1, damage=0.4).make(range(2, 8), damaged=flag)
        for flag in (False, True)
    )
    assert torch.equal(whole.targets, damaged.targets)
    changed = (whole.frames != damaged.frames).any(-1).float().mean()
    assert 0.05 < changed < 0.8
    assert (damaged.frames[:, 0] == BOS).all()


def test_shuffled_texts_hold_the_same_symbols(corpus):
    plain, shuffled = (
        Batches(corpus, seed=2, damage=0.0).make([4], damaged=False, shuffled=flag)
        for flag in (False, True)
    )
    assert plain.text.sort().values.equal(shuffled.text.sort().values)
    assert not plain.text.equal(shuffled.text)


def test_training_batches_leave_validation_out_and_repeat_with_their_seed(corpus):
    first, second = (next(Batches(corpus, seed=3, damage=0.2).training(4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(first.text) == 4
