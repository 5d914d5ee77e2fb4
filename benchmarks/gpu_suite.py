"""Everything that is measured on a GPU, in sections of less than two minutes, beside its floor.

Random weights of the real shape, made on the card. Needs torch, Triton, numpy, safetensors and
tokenizers; transformers and matplotlib are used where they are. The last line is the verdict.

    python -m benchmarks.gpu_suite --json out.json --plot out.png
    python -m benchmarks.gpu_suite --sections ceilings step --profile
    python -m benchmarks.gpu_suite --sections step --ablations dependent-launch prefetch
    python -m benchmarks.gpu_suite --quick                 what the targets ask for, first things first
    python -m benchmarks.gpu_suite --device cpu --tiny     all of its logic, in a minute, without a GPU
    python -m benchmarks.gpu_suite --predict               floors alone: nothing is measured
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks._report import format_table, write_json
from benchmarks.gpu import codec, floors
from benchmarks.gpu.ledger import Ledger
from benchmarks.gpu.random_engine import write_folder
from benchmarks.gpu.suite import ABLATIONS, FULL, QUICK, TOY, Suite
from vllm.platforms import is_lost

SECTIONS = (
    "ceilings",
    "correctness",
    "micro",
    "step",
    "prefill",
    "codec",
    "engine",
    "invariance",
)
# By worth, for a run that may be cut short.
_QUICK_ORDER = (
    "ceilings",
    "step",
    "engine",
    "correctness",
    "invariance",
    "prefill",
    "codec",
    "micro",
)

DEVICE_LOST = 3  # exit code: no kernel runs any more, so the rest wants a new process
_MAX_OVERRUN = 2  # times its seconds; a section that takes longer hangs
_FLUSH_S = 2.0  # between files that are written while a section runs


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available() and not arguments.predict:
        print("FAIL: torch finds no CUDA device; --device cpu --tiny runs the logic without one")
        return 2
    if arguments.device == "cpu" and not (arguments.tiny or arguments.predict):
        print("FAIL: on a CPU the sizes must be --tiny")
        return 2
    if arguments.device == "cpu" and find_spec("triton") is not None:
        # Before anything imports Triton, which reads it then.
        os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as name:
        suite = _suite(arguments, Path(name))
        if arguments.predict:
            print(predicted(suite))
            return 0
        _print_card(suite)
        if not _run_all(suite, _sections(arguments), arguments.json):
            return DEVICE_LOST
    if arguments.plot:
        _plot(suite, arguments.plot)
    print(suite.ledger.targets_table())
    line, is_right = suite.ledger.verdict(is_toy=arguments.tiny)
    print(line)
    return 0 if is_right else 1


def _sections(arguments: argparse.Namespace) -> list[str]:
    chosen = arguments.sections or (_QUICK_ORDER if arguments.quick else SECTIONS)
    return [*chosen, *(["profile"] if arguments.profile and "profile" not in chosen else [])]


def _run_all(suite: Suite, sections: Sequence[str], path: Path | None) -> bool:
    """All sections; False if the device was lost on the way, as after an illegal access."""
    for index, section in enumerate(sections):
        _run(suite, section)
        has_ended = is_lost(suite.device)
        if has_ended:
            suite.note(f"the device is lost; left for a new process: {sections[index + 1 :]}")
        _write(path, suite)
        if has_ended:
            return False
    return True


def predicted(suite: Suite) -> str:
    """Floors of decode steps and prefills from bytes and bandwidth; no measurement is in it."""
    header = ["batch", "context", "GB read", "Gop", "floor ms", "audio-s/s", "fp8 floor ms"]
    rows: list[list[object]] = []
    for batch in suite.scale.step_batches:
        for context in suite.scale.contexts:
            work, small = (
                floors.decode_step(
                    suite.config, batch, context, weight_itemsize=item, kv_itemsize=item
                )
                for item in (suite.scale.dtype.itemsize, 1)
            )
            floor_s, small_s = work.floor_s(suite.ceilings), small.floor_s(suite.ceilings)
            rows.append(
                [
                    *(str(batch), context, work.num_bytes / 1e9, work.operations / 1e9),
                    *(floor_s * 1e3, batch / floor_s / 25, small_s * 1e3),
                ]
            )
    at_best = suite.ceilings
    windows = ["codec, a window", "whole, Gop", "part, Gop", "whole, floor us", "part, floor us"]
    windows.append("floor us per audio s")
    return (
        f"Predicted, not measured: {at_best.read_bytes_s / 1e12:g} TB/s and "
        f"{at_best.matmul_ops_s / 1e12:g} Top/s, {at_best.source}\n"
        f"{format_table(header, rows)}\n\n{format_table(windows, codec.predicted(suite))}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--sections", nargs="+", choices=(*SECTIONS, "profile"), help="default: all but profile"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few cases, those of the targets, by their worth"
    )
    parser.add_argument(
        "--ablations",
        nargs="*",
        choices=tuple(ABLATIONS),
        default=list(ABLATIONS),
        metavar="NAME",
        help="what is measured otherwise too; default: all; "
        + "; ".join(f"{name}: {meaning}" for name, meaning in ABLATIONS.items()),
    )
    parser.add_argument("--profile", action="store_true", help="share of time by kernel as well")
    parser.add_argument("--predict", action="store_true", help="print floors, measure nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for the logic alone")
    parser.add_argument("--seconds", type=float, default=110.0, help="for each section")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--resume", action="store_true", help="add to what --json has already")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG, where matplotlib is")
    return parser


def _suite(arguments: argparse.Namespace, folder: Path) -> Suite:
    scale = TOY if arguments.tiny else QUICK if arguments.quick else FULL
    torch.manual_seed(0)
    suite = Suite(
        device=torch.device(arguments.device),
        scale=scale,
        folder=folder,
        config=write_folder(folder, scale),
        ceilings=floors.ASSUMED_H200,
        ledger=Ledger(),
        seconds_per_section=arguments.seconds,
        ablations=arguments.ablations,
    )
    if arguments.resume and arguments.json and arguments.json.is_file():
        _resume(suite, json.loads(arguments.json.read_text(encoding="utf-8")))
    suite.flush = _flusher(arguments.json, suite)
    return suite


def _resume(suite: Suite, written: dict[str, Any]) -> None:
    """Go on with the figures, and against the ceilings, of an earlier run."""
    suite.ledger = Ledger.from_json(written)
    suite.extras = {
        name: value
        for name, value in written.items()
        if name not in ("circumstances", "ceilings", *Ledger().as_json())
    }
    if ceilings := written.get("ceilings"):
        suite.ceilings = floors.Ceilings(**ceilings)


def _flusher(path: Path | None, suite: Suite) -> Callable[[], None]:
    last = time.monotonic()

    def flush() -> None:
        nonlocal last
        if time.monotonic() - last > _FLUSH_S:
            _write(path, suite)
            last = time.monotonic()

    return flush


def _run(suite: Suite, section: str) -> None:
    """One section; one that breaks is reported and does not keep the others from running."""
    print(f"\n== {section}", flush=True)
    suite.begin(section)
    start = time.monotonic()
    # What hangs would keep everybody from what is written down; the file has all but this section.
    faulthandler.dump_traceback_later(_MAX_OVERRUN * suite.seconds_per_section, exit=True)
    try:
        import_module(f"benchmarks.gpu.{section}").run(suite)
    except Exception:
        suite.ledger.failures.append(f"section {section}")
        suite.extras[f"{section} failure"] = traceback.format_exc()
        traceback.print_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
    gc.collect()
    if suite.is_cuda and not is_lost(suite.device):
        torch.cuda.empty_cache()
    figures = suite.ledger.of(section)
    if figures:
        print(suite.ledger.table(figures))
    seconds = time.monotonic() - start
    suite.extras.setdefault("seconds", {})[section] = round(seconds, 1)
    print(f"{section}: {seconds:.1f} s; bounds: {suite.ceilings.source}", flush=True)


def _print_card(suite: Suite) -> None:
    suite.extras["software"] = software = _software(suite)
    print("  ".join(f"{name} {value}" for name, value in software.items()), flush=True)


def _software(suite: Suite) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        found["triton"] = import_module("triton").__version__
    except ImportError:
        found["triton"] = "absent"
    if suite.is_cuda:
        card = torch.cuda.get_device_properties(suite.device)
        found |= {"card": card.name, "GiB": round(card.total_memory / 2**30, 1)}
    return found


def _write(path: Path | None, suite: Suite) -> None:
    if path is not None:
        ceilings = {"ceilings": asdict(suite.ceilings)}
        # In one go: who is stopped while writing leaves the file as it was.
        part = path.with_name(f"{path.name}.part")
        write_json(part, {**suite.extras, **ceilings, **suite.ledger.as_json()})
        part.replace(path)


def _plot(suite: Suite, path: Path) -> None:
    """Figures with a bound, as multiples of it, by section."""
    try:
        import matplotlib as mpl
    except ImportError:
        print(f"no {path}: matplotlib is not installed")
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figures = [each for each in suite.ledger.figures if each.ratio is not None]
    if not figures:
        print(f"no {path}: no figure has a bound")
        return
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(figures)))
    names = [each.name for each in figures][::-1]
    ratios = [each.ratio for each in figures][::-1]
    axes.barh(range(len(names)), ratios, tick_label=names)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("times the hardware's floor")
    axes.tick_params(axis="y", labelsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
