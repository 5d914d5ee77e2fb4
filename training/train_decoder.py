"""Trains the codec's decoder on codes and the samples that they came from.

    python -m training.train_decoder --data DIR --out DIR [--steps 4000] [--batch 4]

Loss: spectra at four resolutions and mel spectra at three, no discriminator; at both ends of an
utterance, which are next to silent, also the samples themselves, or clips begin and end with a click.
Resumes from ``--out`` where that holds a decoder; a run with the same steps goes on with the same
schedule.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from training.corpus import Corpus
from training.decoder import Decoder
from training.features import FRAME, mel_filters
from training.runs import Run, add_run_arguments

_CROP = 24  # frames
_EDGE = 2 * FRAME  # samples at either end of a crop that lack context
_END = 64  # samples at either end of an utterance that are learnt as they are
_ENDS_SHARE = 1 / 3  # of crops that begin or end where an utterance does
_ENDS_WEIGHT = 20.0
_WINDOWS = (256, 512, 1024, 2048)
_MELS = {512: 40, 1024: 80, 2048: 160}
_MEL_WEIGHT = 3.0


def code_vectors(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sum of the codebooks' rows: [..., 8] -> [..., size]."""
    rows = (codebooks[index][codes[..., index]] for index in range(len(codebooks)))
    return torch.stack(list(rows)).sum(0)


class Crops:
    """Random stretches of the heard utterances, a third of them from either end."""

    def __init__(self, corpus: Corpus, codebooks: Tensor, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        utterances = range(corpus.num_validation, corpus.num_heard)
        self._utterances = [
            (corpus.codes_of(index), corpus.samples_of(index))
            for index in utterances
            if len(corpus.codes_of(index)) > _CROP
        ]
        self._codebooks = codebooks

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Vectors [B, size, 24], samples [B, n], and 1 where an utterance ends or begins, [B, n]."""
        while True:
            codes, samples, is_end = zip(*(self._crop() for _ in range(size)), strict=True)
            stacked = torch.from_numpy(np.stack(codes).astype(np.int64))
            vectors = code_vectors(stacked, self._codebooks).transpose(1, 2)
            yield vectors, torch.from_numpy(np.stack(samples)), torch.from_numpy(np.stack(is_end))

    def _crop(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes, samples = self._utterances[int(self._rng.integers(len(self._utterances)))]
        last = len(codes) - _CROP
        begin = int(self._rng.integers(last + 1))
        if self._rng.random() < _ENDS_SHARE:
            begin = 0 if self._rng.random() < 0.5 else last
        is_end = np.zeros(_CROP * FRAME, np.float32)
        is_end[:_END] = begin == 0
        is_end[-_END:] = begin == last
        stretch = slice(begin * FRAME, (begin + _CROP) * FRAME)
        return codes[begin : begin + _CROP], samples[stretch], is_end


class SpectralLoss:
    """Distance of magnitudes at several resolutions; also reports the mel part, in log10."""

    def __init__(self, device: torch.device) -> None:
        self._windows = {n: torch.hann_window(n, device=device) for n in _WINDOWS}
        self._mels = {n: mel_filters(mels, n).to(device) * n / 8 for n, mels in _MELS.items()}

    def __call__(self, made: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        total, mel_total = made.new_zeros(()), made.new_zeros(())
        for size in _WINDOWS:
            ours, theirs = self._magnitude(made, size), self._magnitude(target, size)
            total = total + 0.5 * (ours - theirs).norm() / (theirs.norm() + 1e-3)
            total = total + ((ours + 1e-3).log() - (theirs + 1e-3).log()).abs().mean()
            if size in self._mels:
                ours, theirs = (
                    (self._mels[size] @ each).clamp_min(1e-5).log10() for each in (ours, theirs)
                )
                mel_total = mel_total + (ours - theirs).abs().mean()
        return total + _MEL_WEIGHT * mel_total, mel_total.detach() / len(self._mels)

    def _magnitude(self, samples: Tensor, size: int) -> Tensor:
        spectrum = torch.stft(
            samples, size, size // 4, window=self._windows[size], return_complex=True
        )
        return spectrum.abs().clamp_min(1e-5)


def ends_loss(made: Tensor, target: Tensor, is_end: Tensor) -> Tensor:
    """Mean distance of the samples at the ends of utterances; 0 where the crops have none."""
    return ((made - target).abs() * is_end).sum() / is_end.sum().clamp(min=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of corpus.safetensors")
    add_run_arguments(parser, steps=4000, batch=4, rate=1.2e-3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    codebooks = load_file(args.data / "codebooks.safetensors")["codebooks"]
    decoder = Decoder(codebooks.shape[-1]).to(device)
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=args.rate, betas=(0.8, 0.99), weight_decay=1e-3
    )
    run = Run(args, "decoder", decoder, [optimizer])
    crops = Crops(Corpus.load(args.data / "corpus.safetensors"), codebooks, args.seed + run.step)
    loss_of = SpectralLoss(device)
    for vectors, samples, is_end in run.steps(crops.batches(args.batch)):
        made = decoder(vectors.to(device))
        wanted = samples.to(device)
        loss, mel = loss_of(made[:, _EDGE:-_EDGE], wanted[:, _EDGE:-_EDGE])
        ends = ends_loss(made, wanted, is_end.to(device))
        run.update(
            loss + _ENDS_WEIGHT * ends,
            {"loss": float(loss.detach()), "mel": float(mel), "ends": float(ends.detach())},
        )


if __name__ == "__main__":
    main()
