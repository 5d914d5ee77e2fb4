"""What the training commands share: steps with a schedule, checkpoints, a log and its plot."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Run", "add_run_arguments"]

_WARM_UP = 60  # steps
_DECAY = 0.4  # last part of the steps, in which the rate falls to zero


def add_run_arguments(
    parser: argparse.ArgumentParser, *, steps: int, batch: int, rate: float
) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of weights and log")
    parser.add_argument("--steps", type=int, default=steps, help="in all, earlier runs included")
    parser.add_argument("--batch", type=int, default=batch, help="utterances or crops in a step")
    parser.add_argument("--rate", type=float, default=rate, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=_DECAY, help="share of steps that cool down")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--log-every", type=int, default=25)


class Run:
    """Steps of one network; its folder holds ``NAME.safetensors``, ``NAME.pt``, ``NAME.jsonl``.

    The first are the weights alone, the second also the optimizer's state, which is not needed to
    go on: without it the optimizer starts anew.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        name: str,
        network: nn.Module,
        optimizers: Sequence[Optimizer],
    ) -> None:
        self.step = 0
        self._args = args
        self._network = network
        self._optimizers = optimizers
        self._rates = [group["lr"] for each in optimizers for group in each.param_groups]
        args.out.mkdir(parents=True, exist_ok=True)
        self._weights, self._state, self._log = (
            args.out / f"{name}{suffix}" for suffix in (".safetensors", ".pt", ".jsonl")
        )
        self._sums: dict[str, float] = {}
        self._num_summed = 0
        self._began = time.process_time()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it saves
        self._resume()

    def steps(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Batches up to the last step, with a progress bar, learning rates and checkpoints."""
        with _Progress(self._args.steps, initial=self.step) as self._progress:
            try:
                while self.step < self._args.steps:
                    self._set_rates()
                    yield next(batches)
                    self.step += 1
                    self._progress.update()
                    if self.step % self._args.save_every == 0:
                        self.save()
            finally:  # also when it is interrupted
                self.save()
                self.plot()

    def update(self, loss: Tensor, figures: Mapping[str, float]) -> None:
        """One step down the gradient of ``loss``; ``figures`` go into the log as means."""
        for each in self._optimizers:
            each.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        for each in self._optimizers:
            each.step()
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._num_summed += 1
        if (self.step + 1) % self._args.log_every == 0:
            means = {name: round(total / self._num_summed, 4) for name, total in self._sums.items()}
            self.log(means)
            self._progress.tell(self.step + 1, means)
            self._sums, self._num_summed = {}, 0

    def log(self, figures: Mapping[str, float]) -> None:
        """Append figures of the step under way."""
        line = {"step": self.step + 1, "cpu_s": round(time.process_time() - self._began)}
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | dict(figures)) + "\n")

    def save(self) -> None:
        """Write weights, then state; each appears whole or not at all."""
        weights = {name: each.contiguous() for name, each in self._network.state_dict().items()}
        partial = self._weights.with_suffix(".partial")
        save_file(weights, partial, metadata={"step": str(self.step)})
        partial.rename(self._weights)
        state = {"step": self.step, "optimizers": [each.state_dict() for each in self._optimizers]}
        partial = self._state.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self._state)

    def plot(self) -> None:
        """Draw the log beside it, where there is one and matplotlib is installed."""
        if not self._log.exists():
            return  # interrupted before the first figures
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        lines = [json.loads(line) for line in self._log.read_text(encoding="utf-8").splitlines()]
        names = list(dict.fromkeys(key for line in lines for key in line))[2:]
        figure = Figure(figsize=(7, 2.2 * len(names)), layout="constrained")
        for index, name in enumerate(names):
            axes = figure.add_subplot(len(names), 1, index + 1)
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True))
            axes.set_ylabel(name)
        figure.savefig(self._log.with_suffix(".png"), dpi=80)

    def _resume(self) -> None:
        if not self._weights.exists():
            return
        self._network.load_state_dict(load_file(self._weights))
        if self._state.exists():
            state = torch.load(self._state, weights_only=True)
            self.step = state["step"]
            for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def _set_rates(self) -> None:
        decay_steps = max(1.0, self._args.decay * self._args.steps)
        factor = min(1.0, (self.step + 1) / _WARM_UP, (self._args.steps - self.step) / decay_steps)
        rates = iter(self._rates)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = next(rates) * factor


class _Progress:
    """A bar of steps where tqdm is installed, and lines of figures where it is not."""

    def __init__(self, total: int, *, initial: int) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            self._bar = None
        else:
            self._bar = tqdm(total=total, initial=initial, mininterval=5)

    def update(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def tell(self, step: int, figures: Mapping[str, float]) -> None:
        if self._bar is not None:
            self._bar.set_postfix(figures)
        else:
            print(f"step {step}:", ", ".join(f"{name} {each:g}" for name, each in figures.items()))

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
