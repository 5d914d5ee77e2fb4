import argparse
import json
import sys
from itertools import repeat

import pytest
import torch
from torch import nn

from training.runs import Run, add_run_arguments


@pytest.fixture
def start(tmp_path):
    """Begins or resumes a run of a network of one weight; arguments are those of a command line."""

    def started(*words):
        parser = argparse.ArgumentParser()
        add_run_arguments(parser, steps=6, batch=1, rate=0.1)
        args = parser.parse_args(["--out", str(tmp_path), "--log-every", "2", *words])
        network = nn.Linear(1, 1, bias=False)
        return Run(args, "one", network, [torch.optim.SGD(network.parameters(), lr=args.rate)])

    return started


def train(run, *, stop_at=None):
    for _ in run.steps(repeat(None)):
        if run.step == stop_at:
            raise KeyboardInterrupt
        loss = run._network.weight.sum()
        run.update(loss, {"loss": loss.item()})


def logged_steps(folder):
    return [json.loads(line)["step"] for line in (folder / "one.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_an_interrupted_run_goes_on_where_it_was(start, tmp_path, stop_at):
    first = start()
    with pytest.raises(KeyboardInterrupt):
        train(first, stop_at=stop_at)
    second = start()
    assert second.step == stop_at
    assert torch.equal(second._network.weight, first._network.weight)
    train(second)
    assert second.step == 6
    assert logged_steps(tmp_path)[-1] == 6


def test_without_the_optimizers_state_the_steps_begin_anew(start, tmp_path):
    first = start()
    train(first)
    (tmp_path / "one.pt").unlink()
    second = start()
    assert second.step == 0
    assert torch.equal(second._network.weight, first._network.weight)


def test_a_rate_need_not_fall(start):
    run = start("--decay", "0")
    train(run)
    assert run._optimizers[0].param_groups[0]["lr"] > 0


def test_figures_are_told_where_there_is_no_progress_bar(start, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    train(start())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4", "step 6"]
    assert all("loss" in line for line in lines)
