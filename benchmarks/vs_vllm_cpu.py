"""Whole engine steps against vLLM's for the CPU, in one interleaved run.

Ours decodes frames of a random Higgs Audio checkpoint, the peer tokens of a random Llama with the
same layers and a vocabulary as large as our eight heads together. Both are greedy, without a prefix
cache, and at the same contexts. A step is schedule, model, sampling and record, in the process of
the engine's core; our codec decodes nothing. The peer runs under an interpreter of its own
(``benchmarks/vllm_cpu_peer.txt`` says how to make it), one process for each of its set-ups, of which
the fastest counts; its ``int8`` is W8A8 in bfloat16, with a head in bfloat16.

    python -m benchmarks.vs_vllm_cpu --peer-python PEER/bin/python
    python -m benchmarks.vs_vllm_cpu --peer-python PEER/bin/python --clock thread \\
        --peer-setups float32:1 bfloat16:1 int8:1 --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks._engine import make_core, make_request
from benchmarks._llama import make_llama
from benchmarks._report import format_table, write_json
from benchmarks._timing import CLOCKS, ratio
from benchmarks.vs_transformers import GREEDY, make_checkpoint
from vllm.checkpoint_config import HiggsAudioConfig
from vllm.v1.core.sched_output import StepKind

PEER = Path(__file__).with_name("_vllm_cpu_peer.py")
FORMATS = ("float32", "int8", "int8/bfloat16")  # of our weights, and behind a slash of pages
PROMPT_LEN = 32
NUM_WARM_STEPS = 5
PEER_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16"}


@dataclass(frozen=True)
class Target:
    """What a format of ours must reach against the peer's best of some formats, and aims at."""

    ours: str
    formats: tuple[str, ...]
    by_batch: Mapping[int, tuple[float, float]] = field(default_factory=dict)


_ANY = tuple(PEER_DTYPES)
_INT8 = {1: (4.0, 6.0), 8: (3.0, 5.0), 32: (3.0, 5.0)}
TARGETS: dict[str, list[Target]] = {
    "tiny": [
        Target("float32", ("float32",), {1: (1.8, 2.5), 8: (1.3, 2), 32: (1.2, 2)}),
        Target("int8", ("float32",)),
        Target("int8", _ANY, _INT8),
        Target("int8/bfloat16", _ANY, _INT8),
    ],
    # One row reads the weights at the memory's speed: int8 of ours and theirs are then as near.
    "medium": [
        Target("float32", ("float32",), {1: (1.05, 1.2)}),
        Target("int8", ("float32",), {1: (2.5, 4)}),
        Target("int8", _ANY),
        Target("int8/bfloat16", _ANY),
    ],
}

Turn = Callable[[int, "Settings"], list[float]]  # of a round: seconds of each step


@dataclass(frozen=True)
class PeerSetup:
    """Format of the peer's weights and its threads, written ``float32:1``."""

    weight_format: str
    num_threads: int

    @classmethod
    def parse(cls, text: str) -> PeerSetup:
        weight_format, _, num_threads = text.partition(":")
        if weight_format not in PEER_DTYPES or not num_threads.isdigit():
            raise argparse.ArgumentTypeError(
                f"{text!r} is none of {', '.join(PEER_DTYPES)} with threads, like float32:1"
            )
        return cls(weight_format, int(num_threads))

    def __str__(self) -> str:
        return f"{self.weight_format}:{self.num_threads}"


@dataclass(frozen=True)
class Settings:
    """What a turn is."""

    size: str  # of the layers
    batch_size: int
    num_steps: int
    clock: str

    @property
    def max_tokens(self) -> int:
        """More than a turn makes, so that nothing ends in it."""
        return 2 * (self.num_steps + NUM_WARM_STEPS) + 64


class Ours:
    """An engine of ours, whose scheduler tells when a step decodes every request."""

    def __init__(self, folder: Path, weight_format: str, max_num_seqs: int, num_threads: int):
        weights, _, pages = weight_format.partition("/")
        options = {} if weights == "float32" else {"quantization": weights}
        self._core = make_core(
            folder,
            decodes_audio=False,
            max_num_seqs=max_num_seqs,
            cpu_threads=num_threads,
            enable_prefix_caching=False,
            kv_cache_dtype=pages or "auto",
            **options,
        )
        self._plan: Any = None
        self._schedule = self._core._scheduler.schedule
        self._core._scheduler.schedule = self._watched  # type: ignore[method-assign]

    def turn(self, index: int, settings: Settings) -> list[float]:
        """Seconds of each step of a turn."""
        names = tuple(f"{index}-{seed}" for seed in range(settings.batch_size))
        for seed, name in enumerate(names):
            request = make_request(
                name,
                num_frames=settings.max_tokens,
                prompt_len=PROMPT_LEN,
                seed=seed,
                **GREEDY,
            )
            self._core.add_request(request)
        self._plan = None
        while not self._decodes(len(names)):
            self._core.step()
        for _ in range(NUM_WARM_STEPS):
            self._core.step()
        clock = CLOCKS[settings.clock]
        seconds = []
        for _ in range(settings.num_steps):
            start = clock()
            self._core.step()
            seconds.append(clock() - start)
            assert self._decodes(len(names)), "a request ended early"
        self._core.abort_requests(names)
        while self._core.has_work():
            self._core.step()
        return seconds

    def close(self) -> None:
        self._core.shutdown()

    def _watched(self) -> Any:
        self._plan = self._schedule()
        return self._plan

    def _decodes(self, num_rows: int) -> bool:
        plan = self._plan
        is_decode = plan is not None and plan.step_kind is StepKind.DECODE
        return is_decode and len(plan.decode) == num_rows


class Peer:
    """A process of the peer's, which does nothing between its turns."""

    def __init__(self, python: Path, folder: Path, setup: PeerSetup, max_num_seqs: int) -> None:
        checkpoint = folder / ("llama-int8" if setup.weight_format == "int8" else "llama")
        dtype = PEER_DTYPES[setup.weight_format]
        self._log = folder / f"peer-{setup}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-I", PEER, checkpoint, dtype, str(max_num_seqs)],
                env=peer_environment(python, setup.num_threads),
                cwd=folder,  # its own processes would import our package from here
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def wait_ready(self) -> None:
        """Block until it has loaded and compiled; raises RuntimeError with its last words."""
        self._answer()

    def turn(self, index: int, settings: Settings) -> list[float]:
        """Seconds of each step of a turn."""
        assert self._process.stdin is not None
        turn = {
            "index": index,
            "prompts": [prompt(seed) for seed in range(settings.batch_size)],
            "num_warm_steps": NUM_WARM_STEPS,
            "num_steps": settings.num_steps,
            "max_tokens": settings.max_tokens,
            "clock": settings.clock,
        }
        print(json.dumps(turn), file=self._process.stdin, flush=True)
        seconds: list[float] = self._answer()
        return seconds

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            words = self._log.read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"the peer has ended:\n{words[-3000:]}")
        return json.loads(line)


def peer_environment(python: Path, num_threads: int) -> dict[str, str]:
    """Of the fastest set-up that was found: one process, tcmalloc and Intel's OpenMP before all."""
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    preloaded = [*sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")), openmp]
    if len(preloaded) < 2 or not openmp.exists():
        raise SystemExit("the peer needs libtcmalloc_minimal.so.4 and its libiomp5.so")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return kept | {
        "LD_PRELOAD": ":".join(map(str, preloaded)),
        "OMP_NUM_THREADS": str(num_threads),
        "KMP_BLOCKTIME": "5",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def prompt(seed: int) -> list[int]:
    """Ids of a request of ours."""
    request = make_request("", num_frames=1, prompt_len=PROMPT_LEN, seed=seed)
    ids: list[int] = np.frombuffer(request.prompt_token_ids, np.int32).tolist()
    return ids


def make_models(folder: Path, size: str) -> None:
    """Ours in ``lm`` and the peer's in ``llama`` and ``llama-int8``; done once for a folder."""
    if (folder / "llama-int8" / "model.safetensors").exists():
        return
    make_checkpoint(folder, size)
    config = HiggsAudioConfig.from_folder(folder / "lm")
    make_llama(folder / "llama", config)
    make_llama(folder / "llama-int8", config, int8=True)


def measure(
    ours: Mapping[str, Turn], peers: Mapping[PeerSetup, Turn], settings: Settings, num_rounds: int
) -> dict[str, Any]:
    """Medians of everybody's steps, and ours against the fastest set-up of the peer's."""
    rivals: dict[str, Turn] = {f"ours {name}": turn for name, turn in ours.items()}
    rivals |= {f"peer {setup}": turn for setup, turn in peers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    before = os.getloadavg()[0]
    for index in tqdm(range(-1, num_rounds), desc=f"batch {settings.batch_size}", unit="round"):
        for name in rivals if index % 2 == 0 else reversed(rivals):
            value = median(rivals[name](index, settings))
            if index >= 0:
                seconds[name].append(value)
    return {
        "batch_size": settings.batch_size,
        "clock": settings.clock,
        "load_average": [before, os.getloadavg()[0]],
        "seconds": {name: median(values) for name, values in seconds.items()},
        "comparisons": compare(seconds, settings.size, settings.batch_size),
    }


def compare(seconds: Mapping[str, list[float]], size: str, batch_size: int) -> list[dict[str, Any]]:
    """Ratios of the peer's fastest set-up of the formats in question to ours."""
    comparisons = []
    for target in TARGETS[size]:
        ours = f"ours {target.ours}"
        formats = tuple(f"peer {each}:" for each in target.formats)
        candidates = [name for name in seconds if name.startswith(formats)]
        if not candidates or ours not in seconds:
            continue
        best = min(candidates, key=lambda name: median(seconds[name]))
        comparisons.append(
            {
                "ours": target.ours,
                "formats": target.formats,
                "best": best,
                "ratio": ratio(seconds[best], seconds[ours]),
                "targets": target.by_batch.get(batch_size),
            }
        )
    return comparisons


def print_results(results: Sequence[dict[str, Any]]) -> None:
    """Step times, then ratios with what they must reach and should."""
    names = list(results[0]["seconds"])
    rows = [
        [
            each["batch_size"],
            *(1e3 * each["seconds"][name] for name in names),
            each["load_average"][1],
        ]
        for each in results
    ]
    print(format_table(["batch", *(f"{name} ms" for name in names), "load"], rows))
    rows = [
        [
            f"{each['batch_size']}, {compared['ours']}",
            compared["best"],
            compared["ratio"],
            *(compared["targets"] or (None, None)),
            _verdict(compared),
        ]
        for each in results
        for compared in each["comparisons"]
    ]
    print(format_table(["batch, ours", "against", "ratio", "must", "aim", ""], rows), flush=True)


def _verdict(compared: Mapping[str, Any]) -> str:
    if not compared["targets"]:
        return ""
    must, aim = compared["targets"]
    if compared["ratio"] < must:
        return "missed"
    return "aim met" if compared["ratio"] >= aim else "met"


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.clock == "thread" and any(each.num_threads > 1 for each in arguments.peer_setups):
        parser.error("--clock thread counts one thread, so --peer-setups may only have one")
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder.resolve()
        make_models(folder, arguments.size)
        max_num_seqs = max(arguments.batch_sizes)
        peers = {}
        for setup in arguments.peer_setups:
            # One at a time: what they compile would compete for cores.
            peer = Peer(arguments.peer_python.absolute(), folder, setup, max_num_seqs)
            stack.callback(peer.close)
            peer.wait_ready()
            peers[setup] = peer.turn
        ours = {}
        for weight_format in arguments.formats:
            engine = Ours(folder, weight_format, max_num_seqs, arguments.num_threads)
            stack.callback(engine.close)
            ours[weight_format] = engine.turn
        results = [
            measure(
                ours,
                peers,
                Settings(arguments.size, batch_size, arguments.num_steps, arguments.clock),
                arguments.num_rounds,
            )
            for batch_size in arguments.batch_sizes
        ]
    print_results(results)
    if arguments.json:
        write_json(arguments.json, {"results": results})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer-python", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--peer-setups",
        type=PeerSetup.parse,
        nargs="+",
        default=[PeerSetup(name, threads) for name in PEER_DTYPES for threads in (1, 2)],
        metavar="FORMAT:THREADS",
    )
    parser.add_argument("--formats", choices=FORMATS, nargs="+", default=FORMATS)
    parser.add_argument(
        "--size", choices=TARGETS, default="tiny", help="of the layers, see vllm checkpoint make"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num-steps", type=int, default=100, help="of one turn")
    parser.add_argument("--num-rounds", type=int, default=7)
    parser.add_argument("--num-threads", type=int, default=1, help="ours")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument(
        "--folder",
        type=Path,
        help="keeps the models there, so that the peer finds again what it has compiled",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
