"""Replaces codes of the heard utterances by what the language model would have drawn there.

    python -m training.predict_codes --data DIR --lm DIR --out DIR

The decoder then learns from such codes and the true samples (``train_decoder --data`` on the new
folder) to sound well where the model's guesses are off. First codes are drawn among those of the
phoneme that sounds, so that codes and samples stay aligned; one utterance in four is kept as it is.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from training.batches import BOS, Batches
from training.corpus import Corpus
from training.network import Network, Sizes
from training.prompt import NUM_TOKENS

_KEPT = 4  # every fourth utterance
_BATCH = 24


class Predictor:
    """Draws codes at each place of an utterance, given the true ones before it."""

    def __init__(
        self, network: Network, labels: Tensor, temperatures: tuple[float, float], seed: int
    ) -> None:
        """``temperatures``: of the first codebook, and of the others."""
        self._network = network
        self._labels = labels
        self._temperatures = temperatures
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def codes(self, corpus: Corpus, indices: list[int]) -> list[NDArray[np.int16]]:
        """Codes [T, 8] of some utterances."""
        batch = Batches(corpus, seed=0, damage=0.0).make(indices, damaged=False)
        frames = batch.frames.clone()
        hidden, _ = self._network(batch.text, batch.num_padding, frames)
        first = self._first_codes(hidden, batch.targets[..., 0])
        # The other codebooks are drawn beside the first codes that were, as the engine does.
        spoken = (frames[:, 1:, 0] < BOS) & (batch.targets[:, :-1, 0] >= 0)
        frames[:, 1:, 0] = torch.where(spoken, first[:, :-1], frames[:, 1:, 0])
        hidden, _ = self._network(batch.text, batch.num_padding, frames)
        logits = self._network.logits(hidden.flatten(0, 1), 1, 7)[..., :BOS]
        rest = self._draw(logits / self._temperatures[1]).view(*first.shape, 7)
        drawn = torch.cat([first[..., None], rest], -1).numpy()
        return [
            self._undelayed(drawn[row], corpus.codes_of(index)) for row, index in enumerate(indices)
        ]

    def _first_codes(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self._network.logits(hidden.flatten(0, 1), 0, 1)[:, 0, :BOS]
        wanted = self._labels[targets.flatten().clamp(0, BOS - 1)]
        logits = logits.masked_fill(self._labels != wanted[:, None], -torch.inf)
        return self._draw((logits / self._temperatures[0])[:, None]).view(targets.shape)

    def _draw(self, logits: Tensor) -> Tensor:
        weights = logits.softmax(-1).flatten(0, 1)
        return torch.multinomial(weights, 1, generator=self._generator)

    @staticmethod
    def _undelayed(drawn: NDArray[np.int64], true: NDArray[np.int16]) -> NDArray[np.int16]:
        """Codes without delay; the last ones of late codebooks are not drawn and stay true."""
        codes = true.copy()
        for k in range(codes.shape[1]):
            count = min(len(codes), len(drawn) - k)
            codes[:count, k] = drawn[k : k + count, k]
        return codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of make_codes")
    parser.add_argument("--lm", type=Path, required=True, help="folder of train_lm")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--temperatures", type=float, nargs=2, default=(0.5, 0.25))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    network = Network(Sizes(NUM_TOKENS)).eval()
    network.load_state_dict(load_file(args.lm / "lm.safetensors"))
    quantizer = load_file(args.data / "codebooks.safetensors")
    predictor = Predictor(network, quantizer["label_of_code"], tuple(args.temperatures), args.seed)
    corpus = Corpus.load(args.data / "corpus.safetensors")
    codes = corpus.codes.copy()
    chosen = [i for i in range(corpus.num_validation, corpus.num_heard) if i % _KEPT]
    for begin in tqdm(range(0, len(chosen), _BATCH)):
        indices = chosen[begin : begin + _BATCH]
        for index, each in zip(indices, predictor.codes(corpus, indices), strict=True):
            codes[corpus.frame_offsets[index] : corpus.frame_offsets[index + 1]] = each
    args.out.mkdir(parents=True, exist_ok=True)
    replace(corpus, codes=codes).save(args.out / "corpus.safetensors")
    save_file(quantizer, args.out / "codebooks.safetensors")


if __name__ == "__main__":
    main()
