"""Builds the kernels of the suite in many processes at once, into Triton's cache on the disk.

One after another they take minutes of a card that waits. Every process makes layers of the model's
shape and launches what steps launch; who comes later loads what is there. What fails here fails
again, and is reported, where it is used.

    python -m benchmarks.gpu.compile_ahead
    python -m benchmarks.gpu.compile_ahead --jobs 8 --quick
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu import floors, kernel_cases, linear_cases
from benchmarks.gpu.codec import load_pairs
from benchmarks.gpu.ledger import Ledger
from benchmarks.gpu.random_engine import drawn_weights
from benchmarks.gpu.suite import FULL, TOY, Scale, Suite
from vllm.checkpoints.make_codec import make_codec
from vllm.checkpoints.make_model import make_model
from vllm.forward_context import set_forward_context
from vllm.kernels.attention import PrefillMetadata, PrefillSequence
from vllm.kernels.cache import allocate_kv_caches
from vllm.kernels.dependent_launch import DependentLaunch
from vllm.kernels.linear_config import ROW_BUCKETS
from vllm.model_executor.models import load_model
from vllm.platforms import num_cores
from vllm.v1.worker.model_state import CodebookModelState

__all__ = ["Task", "main", "tasks"]

_NUM_LAYERS = 2  # all are alike, and the last one of a prefill is none
_BLOCK_SIZE = 16


class Task(NamedTuple):
    """What one process builds: the kernels for one bucket of rows."""

    kind: str  # "step", "case" for what sections correctness and micro call by itself, "codec"
    num_rows: int = 0
    is_fp8: bool = False
    pdl: DependentLaunch = DependentLaunch.OFF

    def __str__(self) -> str:
        if self.kind == "codec":
            return self.kind
        pdl = f", dependent launch {self.pdl.value}" if self.pdl.is_on else ""
        return f"{self.kind} of {self.num_rows} rows{', fp8' if self.is_fp8 else ''}{pdl}"


def tasks(*, is_quick: bool) -> list[Task]:
    """All of them, those that most depend on first."""
    formats = (False,) if is_quick else (False, True)
    found = [Task("step", rows, each) for each in formats for rows in ROW_BUCKETS]
    found.append(Task("codec"))
    # In other types than a step has them: results of heads, inputs of fp8.
    found += [Task("case", rows, each) for each in formats for rows in ROW_BUCKETS]
    overlaps = [each for each in DependentLaunch if each.is_on and not is_quick]
    return found + [Task("step", rows, pdl=each) for each in overlaps for rows in ROW_BUCKETS]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=min(num_cores(), 15), help="processes")
    parser.add_argument("--quick", action="store_true", help="without fp8 and dependent launches")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for the logic alone")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # there is nothing to build; read when it starts
    failed, start = 0, time.monotonic()
    todo = tasks(is_quick=arguments.quick or arguments.device == "cpu")
    todo = todo[:1] if arguments.tiny else todo
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        started = {
            pool.submit(build, task, arguments.device, arguments.tiny): task for task in todo
        }
        for future in as_completed(started):
            problem = future.exception() or future.result()
            failed += problem is not None
            seconds = time.monotonic() - start
            print(f"{seconds:5.1f} s  {started[future]}: {problem or 'built'}", flush=True)
    print(f"kernels of {len(todo) - failed} of {len(todo)} tasks built in {seconds:.0f} s")
    return 1 if failed else 0


def build(task: Task, device: str, is_tiny: bool) -> str | None:
    """Launch everything once; what went wrong, if anything."""
    scale = TOY if is_tiny else FULL
    with tempfile.TemporaryDirectory() as name:
        try:
            suite = _suite(Path(name), scale, torch.device(device))
            with torch.inference_mode():
                {"step": _step, "case": _cases, "codec": _codec}[task.kind](suite, task)
            if suite.is_cuda:
                torch.cuda.synchronize()
        except Exception:
            return traceback.format_exc()
    return None


def _suite(folder: Path, scale: Scale, device: torch.device) -> Suite:
    """Of a model of few layers."""
    write = partial(make_model, folder / "lm", layout="transformers", with_weights=False)
    config = write(config=replace(write(size=scale.model), num_hidden_layers=_NUM_LAYERS))
    return Suite(
        device=device,
        scale=scale,
        folder=folder,
        config=config,
        ceilings=floors.ASSUMED_H200,
        ledger=Ledger(),
    )


def _step(suite: Suite, task: Task) -> None:
    """A decode step, and a prefill of rows of both kinds."""
    config, device, count = suite.config, suite.device, task.num_rows
    with drawn_weights(suite):
        model = load_model(
            suite.folder / "lm",
            device=device,
            dtype=str(suite.scale.dtype).removeprefix("torch."),
            max_model_len=suite.scale.max_model_len,
            quantization="fp8" if task.is_fp8 else None,
        )
    blocks_each = -(-suite.scale.max_model_len // _BLOCK_SIZE)
    caches = allocate_kv_caches(
        *(config.num_hidden_layers, blocks_each, _BLOCK_SIZE),
        *(config.num_key_value_heads, config.head_dim),
        dtype=torch.float8_e4m3fn if task.is_fp8 else suite.scale.dtype,
        device=device,
    )
    table = torch.arange(blocks_each, device=device)
    state = CodebookModelState(model, count, device)
    step = state.fused_step(
        *(caches, table.expand(count, -1).contiguous()),
        max_batch=count,
        batch_invariant=True,
        pdl=task.pdl,
    )
    rows = torch.arange(count, device=device)
    if step is not None:
        positions = torch.full((count,), 300 % suite.scale.max_model_len, device=device)
        logits = step(rows, positions, suite.scale.max_model_len)
        results = torch.zeros(count, config.num_codebooks + 1, dtype=torch.int16, device=device)
        sampler = state.device_sampler(positions, pdl=task.pdl.is_on)
        sampler(logits.view(count, config.num_codebooks, -1), rows, results)
    sequence = PrefillSequence(rows, table[: -(-count // _BLOCK_SIZE)], start=0, length=count)
    metadata = PrefillMetadata.build([sequence], _BLOCK_SIZE)
    hidden = torch.zeros(count, config.hidden_size, dtype=suite.scale.dtype, device=device)
    with set_forward_context(metadata, caches):
        model.fill_cache(hidden, rows, count // 2 + 1)


def _codec(suite: Suite, _: Task) -> None:
    """Loading the codec builds what decodes; its kernels are the same for any number of rows."""
    folder = suite.folder / "codec"
    make_codec(folder, layout="transformers", size=suite.scale.codec, seed=0, decode_only=True)
    if suite.is_cuda:
        load_pairs(suite)


def _cases(suite: Suite, task: Task) -> None:
    """Kernels one by one, as the sections take them."""
    cases = itertools.chain(
        linear_cases.linear_cases(suite, task.num_rows, is_cold=False, is_fp8=task.is_fp8),
        [
            linear_cases.embed_case(suite, task.num_rows),
            kernel_cases.attention_case(suite, 1, suite.scale.contexts[0], is_cold=False),
        ],
    )
    for case in cases:
        case.first_rows(case.num_rows)


if __name__ == "__main__":
    sys.exit(main())
