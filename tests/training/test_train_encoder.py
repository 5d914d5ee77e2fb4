import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from training.encoder import Encoder, stage_inputs
from training.make_codes import NUM_LABELS, TEACHER_HOP
from training.train_encoder import CodeLoss, quantize
from training.train_encoder import main as train_encoder
from vllm.model_executor.codecs.hubert import resample

RATE, FRAME = 24000, 960


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return Encoder(64).eval()


def tone(hz, amplitude, seconds=1.0):
    places = torch.arange(round(RATE * seconds)) / RATE
    return amplitude * torch.sin(2 * math.pi * hz * places)[None]


def bands(encoder, samples):
    """What the filters say, [steps, bands]."""
    x = torch.nn.functional.pad(resample(samples, RATE, 16000), (160, 160))[:, None]
    for layer in list(encoder.semantic_model.feature_extractor.conv_layers)[:2]:
        x = layer(x)
    return x[0, :-1].T  # the last channel stands for a bias


@torch.no_grad()
def test_filters_find_the_pitch_of_a_tone_and_twice_its_loudness(encoder):
    quiet, loud = (bands(encoder, tone(637.0, level))[20:80].mean(0) for level in (0.02, 0.04))
    assert int(loud.argmax()) == 18  # bins are 33.3 Hz apart and begin with the first
    assert float(loud[18] / quiet[18]) == pytest.approx(2.0, rel=0.05)


@torch.no_grad()
def test_loudness_does_not_depend_on_the_rest_of_the_clip(encoder):
    alone = bands(encoder, tone(637.0, 0.02))
    before_noise = torch.cat([tone(637.0, 0.02), 0.2 * torch.randn(1, RATE)], 1)
    loudness = bands(encoder, before_noise)[5:90, 18]
    assert float(loudness.mean() / alone[5:90, 18].mean()) == pytest.approx(1.0, rel=0.02)


@torch.no_grad()
def test_a_frame_comes_out_of_960_samples(encoder):
    for frames in (1, 7):
        assert encoder(torch.zeros(2, frames * FRAME)).shape == (2, frames, 224)


def test_the_first_stage_alone_sees_which_phoneme_it_is():
    vectors = torch.arange(8.0)
    first, others = stage_inputs(vectors, 3)
    assert first.tolist() == [3, 5, 7]
    assert others.tolist() == [0, 1, 2]


def test_each_stage_quantizes_what_is_left():
    books = torch.randn(8, 16, 4, generator=torch.Generator().manual_seed(1))
    codes = torch.tensor([[3, 5, 7, 1, 2, 0, 9, 15]])
    small = books * 0.2 ** torch.arange(8)[:, None, None]
    vector = torch.stack([book[code] for book, code in zip(small, codes[0], strict=True)]).sum(0)
    found = quantize(torch.cat([vector, torch.zeros(6)])[None], small)
    assert int(found[0, 0]) == 3


def test_the_nearest_code_costs_least():
    book = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    loss = CodeLoss(book, 1.0)
    near, far = (float(loss(torch.tensor([[1.9, 0.3]]), torch.tensor([code]))) for code in (1, 0))
    assert near < 0.1 < far


@pytest.fixture
def shards(tmp_path):
    """Two shards of hums, in the form of ``make_data``, and codebooks of their size."""
    rng = np.random.default_rng(2)
    for index in range(2):
        hum = np.sin(np.arange(96 * TEACHER_HOP) * rng.uniform(0.03, 0.2))
        np.savez(
            tmp_path / f"shard-{index:03}.npz",
            texts=np.array(json.dumps({"texts": ["a"], "kinds": ["word"]})),
            num_symbols=np.array([2]),
            symbols=np.array([3, 4], np.uint8),
            durations=np.array([10, 38, 38, 10], np.uint8),
            num_frames=np.array([96]),
            f0=np.full(96, 200.0, np.float16),
            samples=(9000 * hum).astype(np.int16),
        )
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "mean": torch.zeros(328),
        "scale": torch.ones(328),
        "basis": torch.linalg.qr(torch.randn(328, 64, generator=generator)).Q.contiguous(),
        "codebooks": torch.randn(8, 1024, 64, generator=generator),
        "label_of_code": torch.arange(1024) % NUM_LABELS,
    }
    save_file(tensors, tmp_path / "codebooks.safetensors")
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*Matplotlib.*")
def test_training_gets_nearer_and_goes_on_where_it_was(shards, monkeypatch):
    def run(steps):
        words = ["train_encoder", "--data", str(shards), "--shards", "2", "--batch", "1"]
        words += ["--codebooks", str(shards / "codebooks.safetensors"), "--out", str(shards)]
        monkeypatch.setattr(sys, "argv", [*words, "--steps", str(steps), "--log-every", "4"])
        train_encoder()

    run(4)
    run(12)
    lines = [json.loads(line) for line in (shards / "encoder.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert lines[-1]["missed"] < lines[0]["missed"]
