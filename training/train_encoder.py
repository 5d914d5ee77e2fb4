"""Trains the codec's encoder to find the vectors that the analytic features have.

    python -m training.train_encoder --data DIR --codebooks FILE --out DIR [--steps 2500] [--batch 8]

Loss: squared distance to the principal components that ``make_codes`` quantizes, the cross entropy
of the first code, which knows the phoneme there, and that of the second. Loudness is varied and
noise added. Resumes from ``--out`` where that holds an encoder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from training.corpus import shard_path
from training.encoder import Encoder, stage_inputs
from training.features import FRAME
from training.make_codes import Quantizer, frame_labels, read_shard
from training.muon import Muon
from training.runs import Run, add_run_arguments

_SHORTEST, _LONGEST = 20, 100  # frames of a crop
_CROP = 50  # frames; there are --batch crops of this length in a step, or more, or fewer
_EDGE = 1  # frames at either end of a crop that lack context
_MAX_GAIN_DB = 2.0
_NOISE_DB = (-90.0, -50.0)
_CLEAN_SHARE = 0.5
_VALIDATE_EVERY = 100
_NUM_VALIDATION = 12
_NEAR = 0.2
_SOUND_WEIGHT, _FIRST_WEIGHT, _SECOND_WEIGHT = 10.0, 0.3, 0.1


class Clip(NamedTuple):
    samples: NDArray[np.int16]  # [num_frames * 960]
    vectors: Tensor  # [num_frames, 64], what is quantized
    codes: Tensor  # int64 [num_frames, 8]


def read_clips(path: Path, quantizer: Quantizer) -> list[Clip]:
    """Utterances of a shard, with what the encoder has to find in them."""
    shard = read_shard(path)
    parts = zip(shard.samples, shard.features, shard.symbols, shard.durations, strict=True)
    clips = []
    for samples, features, symbols, durations in parts:
        measured = torch.from_numpy(features)
        labels = torch.from_numpy(frame_labels(symbols, durations, len(features)))
        vectors = quantizer.project(measured)
        clips.append(Clip(samples, vectors, quantizer.encode(measured, labels)))
    return clips


class Crops:
    """Random stretches of equal length: samples [B, n], vectors [B, T, 64], codes [B, T, 8]."""

    def __init__(self, clips: list[Clip], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._clips = sorted(clips, key=lambda each: len(each.codes))
        self._lengths = np.array([len(each.codes) for each in self._clips])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        while True:
            length = int(self._rng.integers(_SHORTEST, min(_LONGEST, self._lengths[-1]) + 1))
            count = max(1, round(size * _CROP / length))
            crops = [self._crop(length) for _ in range(count)]
            samples, vectors, codes = (torch.stack(each) for each in zip(*crops, strict=True))
            yield samples, vectors, codes

    def _crop(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        first_long = int(np.searchsorted(self._lengths, length))
        clip = self._clips[int(self._rng.integers(first_long, len(self._clips)))]
        begin = int(self._rng.integers(len(clip.codes) - length + 1))
        end = begin + length
        samples = clip.samples[begin * FRAME : end * FRAME].astype(np.float32) / 32767
        return self._varied(samples), clip.vectors[begin:end], clip.codes[begin:end]

    def _varied(self, samples: NDArray[np.float32]) -> Tensor:
        samples *= 10 ** (self._rng.uniform(-_MAX_GAIN_DB, _MAX_GAIN_DB) / 20)
        if self._rng.random() > _CLEAN_SHARE:
            noise = self._rng.standard_normal(len(samples), dtype=np.float32)
            samples += noise * 10 ** (self._rng.uniform(*_NOISE_DB) / 20)
        return torch.from_numpy(samples)


class CodeLoss:
    """Cross entropy of a stage's codes, by the distances that the engine compares."""

    def __init__(self, book: Tensor, spread: float) -> None:
        self._book, self._norms = book, (book * book).sum(1)
        self._spread = spread  # squared distance that is no distance

    def __call__(self, points: Tensor, codes: Tensor) -> Tensor:
        logits = (2 * points @ self._book.T - self._norms) / self._spread
        return F.cross_entropy(logits.flatten(0, -2), codes.flatten())


@torch.no_grad()
def quantize(vectors: Tensor, codebooks: Tensor) -> Tensor:
    """What the engine makes of an encoder's vectors [T, size]: codes [T, 8]."""
    first, rest = stage_inputs(vectors, codebooks.shape[-1])
    codes = []
    for index, book in enumerate(codebooks):
        point = rest if index else first
        codes.append((2 * point @ book.T - (book * book).sum(1)).argmax(-1))
        rest = rest - book[codes[-1]]
    return torch.stack(codes, -1)


@torch.no_grad()
def validate(encoder: Encoder, clips: list[Clip], codebooks: Tensor) -> dict[str, float]:
    """Share of the variance that is missed, and shares of codes that are the analytic ones."""
    encoder.eval()
    device = encoder.fc.weight.device
    missed = total = 0.0
    agreeing: list[Tensor] = []
    for clip in clips:
        samples = torch.from_numpy(clip.samples.astype(np.float32) / 32767)[None]
        vectors = encoder(samples.to(device))[0].cpu()
        sound = stage_inputs(vectors, codebooks.shape[-1])[1]
        missed += float((sound - clip.vectors).square().sum())
        total += float(clip.vectors.square().sum())
        agreeing.append(quantize(vectors, codebooks) == clip.codes)
    encoder.train()
    shares = torch.cat(agreeing).float().mean(0)
    figures = {"val_missed": missed / total}
    return figures | {f"val_same{index}": float(shares[index]) for index in (0, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--codebooks", type=Path, required=True, help="file of make_codes")
    parser.add_argument("--shards", type=int, default=7)
    add_run_arguments(parser, steps=2500, batch=8, rate=0.01)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    quantizer = Quantizer(**load_file(args.codebooks))
    held_out = read_clips(shard_path(args.data, 0), quantizer)[:_NUM_VALIDATION]
    clips = [
        clip
        for index in range(1, args.shards)
        for clip in read_clips(shard_path(args.data, index), quantizer)
    ]
    codebooks = quantizer.codebooks
    vectors = torch.cat([clip.vectors for clip in held_out])
    encoder = Encoder(codebooks.shape[-1], vectors.std(0)).to(device)
    run = Run(args, "encoder", encoder, _optimizers(encoder, args.rate))
    crops = Crops(clips, args.seed + run.step)
    variance = float(vectors.square().sum(-1).mean())
    losses = _code_losses(held_out, codebooks, device)
    first_book = codebooks[0].to(device)
    for batch in run.steps(crops.batches(args.batch)):
        samples, wanted, codes = (each.to(device) for each in batch)
        found = encoder(samples)[:, _EDGE:-_EDGE]
        wanted, codes = wanted[:, _EDGE:-_EDGE], codes[:, _EDGE:-_EDGE]
        first, sound = stage_inputs(found, codebooks.shape[-1])
        missed = (sound - wanted).square().sum(-1).mean() / variance
        entropies = [
            losses[0](first, codes[..., 0]),
            losses[1](sound - first_book[codes[..., 0]], codes[..., 1]),
        ]
        loss = _SOUND_WEIGHT * missed + _FIRST_WEIGHT * entropies[0] + _SECOND_WEIGHT * entropies[1]
        figures = {"missed": missed, "first": entropies[0], "second": entropies[1]}
        run.update(loss, {name: float(each.detach()) for name, each in figures.items()})
        if (run.step + 1) % _VALIDATE_EVERY == 0:
            run.log(validate(encoder, held_out, codebooks))


def _optimizers(encoder: Encoder, rate: float) -> list[torch.optim.Optimizer]:
    inner, outer = [], []
    for name, weight in encoder.named_parameters():
        if weight.requires_grad:
            is_inner = weight.dim() > 1 and name.startswith(
                ("semantic_model.", "encoder_semantic.")
            )
            (inner if is_inner else outer).append(weight)
    adam = torch.optim.AdamW(outer, lr=rate / 10, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(inner, lr=rate), adam]


def _code_losses(clips: list[Clip], codebooks: Tensor, device: torch.device) -> list[CodeLoss]:
    """Of the first two stages; what counts as near is a share of what a stage leaves over."""
    rest = torch.cat([clip.vectors for clip in clips])
    codes = torch.cat([clip.codes for clip in clips])
    losses = []
    for index in range(2):
        rest = rest - codebooks[index][codes[:, index]]
        spread = _NEAR * float(rest.square().sum(-1).mean())
        losses.append(CodeLoss(codebooks[index].to(device), spread))
    return losses


if __name__ == "__main__":
    main()
