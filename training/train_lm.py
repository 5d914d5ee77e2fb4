"""Trains the language model, and logs from the first steps on whether it reads.

    python -m training.train_lm --data DIR --out DIR [--steps 3000] [--batch 24]

The figure to watch is ``gap``: how many nats per frame the first codebook loses on validation
utterances when the symbols of their text are shuffled. A model that does not read loses none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from training.alphabet import SYMBOLS
from training.batches import IGNORED, Batch, Batches
from training.corpus import Corpus
from training.muon import Muon
from training.network import CURRENT_HEADS, NEXT_HEADS, Network, Sizes
from training.prompt import FIRST_SYMBOL_ID, NUM_TOKENS, PREFIX, SUFFIX
from training.runs import Run, add_run_arguments

# Words live in the first codebooks, so most of the loss is theirs.
_WEIGHTS = (3.0, 3.0, 1.5, 0.8, 0.5, 0.3, 0.2, 0.2)
_LABEL_WEIGHT = 0.7  # of naming the sound right, beside the codes
_NUM_SURE = 2  # codebooks that every frame is learnt for; the others learn from one in this many
_SHARE = 5
_NUM_VALIDATED = 96
_ADAM_RATE = 2e-3  # at a Muon rate of 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of corpus.safetensors")
    parser.add_argument("--guide", type=float, default=1.0, help="weight of the taught attention")
    parser.add_argument("--damage", type=float, default=0.15, help="share of context replaced")
    parser.add_argument(
        "--references", type=float, default=0.5, help="share of batches that have clips"
    )
    parser.add_argument("--validate-every", type=int, default=100)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--bfloat16", action="store_true", help="matrix products; where the processor has them"
    )
    add_run_arguments(parser, steps=3000, batch=24, rate=0.02)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    network = Network(Sizes(NUM_TOKENS, num_hidden_layers=args.layers)).to(device)
    quantizer = load_file(args.data / "codebooks.safetensors")
    labels = quantizer["label_of_code"]
    network.know_codes(quantizer["codebooks"], _text_ids(labels))
    labels = labels.to(device)
    run = Run(args, "lm", network, _optimizers(network, args.rate, dtype))
    corpus = Corpus.load(args.data / "corpus.safetensors")
    batches = Batches(
        corpus,
        seed=args.seed + run.step,
        damage=args.damage,
        reference_share=args.references,
    )
    for batch in run.steps(batches.training(args.batch)):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bfloat16):
            loss, figures = _loss(network, batch.to(device), labels, args.guide)
        run.update(loss, figures)
        if (run.step + 1) % args.validate_every == 0:
            run.log(validate(network, corpus, device))


def _optimizers(network: Network, rate: float, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    inner, outer = [], []
    for name, weight in network.named_parameters():
        # Muon costs as much for a matrix of the text's half as for one of the audio's, and the
        # text's is the easier half.
        is_inner = weight.dim() == 2 and ".layers." in name and ".mlp." not in name
        (inner if is_inner else outer).append(weight)
    adam = torch.optim.AdamW(
        outer, lr=rate / 0.02 * _ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    return [Muon(inner, lr=rate, dtype=dtype), adam]


def _text_ids(labels: Tensor) -> Tensor:
    """Text id of each label: symbols have their own, silence that which it is aligned to."""
    ids = labels + FIRST_SYMBOL_ID
    ids[labels == len(SYMBOLS)] = PREFIX[-1]
    ids[labels == len(SYMBOLS) + 1] = SUFFIX[0]
    return ids


def _loss(
    network: Network, batch: Batch, labels: Tensor, guide_weight: float
) -> tuple[Tensor, dict[str, float]]:
    hidden, taught = network(batch.text, batch.num_padding, batch.frames, batch.positions)
    known = (batch.targets != IGNORED).any(-1)
    hidden, targets = hidden.flatten(0, 1), batch.targets.flatten(0, 1)
    logits = network.logits(hidden, 0, _NUM_SURE)
    sure = _entropies(logits, targets[:, :_NUM_SURE])
    some = torch.randperm(len(hidden), device=hidden.device)[: len(hidden) // _SHARE]
    rest = _entropies(network.logits(hidden[some], _NUM_SURE, 6), targets[some, _NUM_SURE:])
    entropies = torch.cat([sure, rest])
    weights = torch.tensor(_WEIGHTS, device=hidden.device)
    loss = (entropies * weights).sum() / weights.sum()
    label = _label_entropy(logits[:, 0], targets[:, 0], labels)
    guide = _guide_loss(taught, batch.reading, known)
    figures = {"loss": float(loss.detach()), "guide": float(guide.detach())}
    figures |= {"label": float(label.detach())}
    figures |= {f"q{index}": float(entropies[index].detach()) for index in (0, 1, 2)}
    return loss + _LABEL_WEIGHT * label + guide_weight * guide, figures


def _label_entropy(logits: Tensor, codes: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of what is spoken, whichever first code says so."""
    logits = logits[:, : len(labels)]
    spoken = (codes >= 0) & (codes < len(labels))  # neither ignored nor the end
    wanted = labels[codes.where(spoken, 0)]
    among = logits.masked_fill(labels != wanted[:, None], -torch.inf)
    each = logits.logsumexp(-1) - among.logsumexp(-1)
    return each.where(spoken, 0).sum() / spoken.sum()


def _entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of each codebook, in nats, of logits [N, count, 1026]."""
    each = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    counts = (targets != IGNORED).sum(0).clamp(min=1)
    return each.view(targets.shape).sum(0) / counts


def _guide_loss(taught: list[Tensor], reading: Tensor, known: Tensor) -> Tensor:
    """Cross entropy between the attention of the taught heads and the true alignment."""
    after = torch.cat([reading[..., :1] * 0, reading[..., :-1]], -1)
    # Silence after the speech has no successor to read.
    last = reading.flatten(0, 1).sum(0).nonzero().max()
    after[..., last] += after[..., last + 1]
    after[..., last + 1] = 0
    goals = [reading] * len(CURRENT_HEADS) + [after] * len(NEXT_HEADS)
    ordered = _by_layer(goals)
    losses = [
        -(goal * attention).sum(-1)[known].mean()
        for goal, attention in zip(ordered, taught, strict=True)
    ]
    return torch.stack(losses).mean()


def _by_layer(goals: list[Tensor]) -> list[Tensor]:
    """Goals in the order in which the network gives its taught heads: by layer."""
    heads = [*CURRENT_HEADS, *NEXT_HEADS]
    order = sorted(range(len(heads)), key=lambda index: heads[index][0])
    return [goals[index] for index in order]


@torch.no_grad()
def validate(network: Network, corpus: Corpus, device: torch.device) -> dict[str, float]:
    """Entropies of validation utterances, with their own text and with its symbols shuffled."""
    network.eval()
    batches = Batches(corpus, seed=0, damage=0.0)
    count = min(_NUM_VALIDATED, corpus.num_validation)
    totals = np.zeros(3)
    for begin in range(0, count, 24):
        indices = range(begin, min(begin + 24, count))
        for shuffled in (False, True):
            batch = batches.make(indices, damaged=False, shuffled=shuffled).to(device)
            hidden, _ = network(batch.text, batch.num_padding, batch.frames, batch.positions)
            known = (batch.targets != IGNORED).any(-1)
            found = _entropies(network.logits(hidden[known], 0, 2), batch.targets[known, :2])
            share = len(indices) / count
            totals += share * np.array([found[0], 0, 0] if shuffled else [0, *found])
    network.train()
    shuffled_q0, val_q0, val_q1 = totals
    figures = {"val_q0": val_q0, "val_q1": val_q1, "gap": shuffled_q0 - val_q0}
    return {name: round(float(value), 3) for name, value in figures.items()}


if __name__ == "__main__":
    main()
