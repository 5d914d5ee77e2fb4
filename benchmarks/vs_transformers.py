"""Frames per second of the engine against transformers' ``generate``, in one interleaved run.

Both run the same random float32 checkpoint on the CPU, greedily, with EOS out of reach; the
engine is batch-invariant, as by default. Lengths of the 16 requests are uniform in 25 to 200
frames; only frames that were asked for count, so a static batch pays for its longest member.

    python -m benchmarks.vs_transformers
    python -m benchmarks.vs_transformers --num-threads 1 2 --json out.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks._engine import make_core, make_request, run_to_end
from benchmarks._report import format_table, write_json
from benchmarks._timing import interleave, ratio
from vllm.checkpoint_config import HiggsAudioConfig
from vllm.checkpoints import run_make
from vllm.v1.engine.core import EngineCore

GREEDY: dict[str, Any] = {"temperature": 0.0, "ras_window_length": 0}
WITH_RAS: dict[str, Any] = {"temperature": 0.0, "ras_window_length": 7, "ras_max_num_repeat": 2}
NUM_REQUESTS = 16

# Scenario -> [(ours, theirs, least ratio)]
TARGETS = {
    "batch 1": [("engine", "transformers", 1.3)],
    "16 requests": [
        ("engine", "transformers one by one", 5.0),
        ("engine", "transformers static batch", 2.0),
    ],
}


def make_checkpoint(folder: Path, size: str) -> None:
    """A random checkpoint whose logits of EOS are always 0, which is never the largest."""
    run_make(folder, layout="transformers", size=size)
    file = folder / "lm" / "model.safetensors"
    weights = load_file(file)
    config = HiggsAudioConfig.from_folder(folder / "lm")
    head = weights["audio_lm_head.weight"].view(config.num_codebooks, config.codebook_size, -1)
    head[:, config.stream_eos_id] = 0
    save_file(weights, file, metadata={"format": "pt"})


class Peer:
    """transformers' model on the same files, without its repetition-aware sampling."""

    def __init__(self, folder: Path) -> None:
        from transformers import HiggsAudioV2ForConditionalGeneration

        model = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self._model: Any = model.eval()
        for name in ("ras_win_len", "ras_win_max_num_repeat"):
            if hasattr(self._model.generation_config, name):
                delattr(self._model.generation_config, name)

    def generate(self, seeds: Sequence[int], num_frames: int) -> None:
        """One static batch of the prompts of these seeds."""
        prompts = [make_request("", num_frames=1, seed=seed).prompt_token_ids for seed in seeds]
        ids = torch.from_numpy(np.stack([np.frombuffer(p, np.int32) for p in prompts])).long()
        with torch.inference_mode():
            frames = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_frames,
                do_sample=False,
            )
        assert frames.shape[1] == num_frames, "EOS came early"


def serve(core: EngineCore, lengths: Sequence[int], params: dict[str, Any]) -> None:
    """All requests through the engine."""
    requests = [
        make_request(str(seed), num_frames=length, seed=seed, **params)
        for seed, length in enumerate(lengths)
    ]
    made = run_to_end(core, requests)
    assert made == sum(lengths), f"{made} frames of {sum(lengths)}"


def measure(checkpoint: Path, *, num_threads: int, num_rounds: int) -> list[dict[str, Any]]:
    """Both scenarios with one number of threads for everything."""
    cores = {
        name: make_core(
            checkpoint,
            decodes_audio=decodes_audio,
            cpu_threads=num_threads,
            max_num_seqs=NUM_REQUESTS,
            # Every repetition must compute its prompts, as the peer does.
            enable_prefix_caching=False,
        )
        for name, decodes_audio in (("engine", False), ("with codec", True))
    }
    peer = Peer(checkpoint / "lm")
    torch.set_num_threads(num_threads)
    lengths = np.random.default_rng(0).integers(25, 201, NUM_REQUESTS).tolist()
    seeds = range(NUM_REQUESTS)

    def one_by_one() -> None:
        for seed, length in enumerate(lengths):
            peer.generate([seed], length)

    scenarios: dict[str, tuple[list[int], dict[str, Callable[[], object]]]] = {
        "batch 1": ([100], {"transformers": lambda: peer.generate([0], 100)}),
        "16 requests": (
            lengths,
            {
                "transformers one by one": one_by_one,
                "transformers static batch": lambda: peer.generate(seeds, max(lengths)),
            },
        ),
    }
    results = []
    for scenario, (counts, rivals) in scenarios.items():
        everyone = {
            "engine": lambda counts=counts: serve(cores["engine"], counts, GREEDY),
            "engine, RAS on": lambda counts=counts: serve(cores["engine"], counts, WITH_RAS),
            "engine with codec": lambda counts=counts: serve(cores["with codec"], counts, GREEDY),
            **rivals,
        }
        before = os.getloadavg()[0]
        title = f"{scenario}, {num_threads} threads"
        seconds = interleave(everyone, num_rounds=num_rounds, title=title)
        result = _result(scenario, num_threads, sum(counts), seconds, before)
        print_result(result)
        results.append(result)
    for core in cores.values():
        core.shutdown()
    return results


def _result(
    scenario: str,
    num_threads: int,
    num_frames: int,
    seconds: dict[str, list[float]],
    load_before: float,
) -> dict[str, Any]:
    ours = [name for name in seconds if name.startswith("engine")]
    theirs = [name for name in seconds if not name.startswith("engine")]
    return {
        "scenario": scenario,
        "num_threads": num_threads,
        "num_frames": num_frames,
        "load_average": [load_before, os.getloadavg()[0]],
        "frames_per_s": {name: num_frames / median(s) for name, s in seconds.items()},
        "ratios": {
            f"{name} / {peer}": ratio(seconds[peer], seconds[name])
            for name in ours
            for peer in theirs
        },
        "targets": [
            {
                "ratio": f"{name} / {peer}",
                "least": least,
                "met": ratio(seconds[peer], seconds[name]) >= least,
            }
            for name, peer, least in TARGETS[scenario]
        ],
    }


def print_result(result: dict[str, Any]) -> None:
    before, after = result["load_average"]
    print(
        f"\n{result['scenario']}, {result['num_threads']} threads, "
        f"{result['num_frames']} frames, load average {before:.1f} to {after:.1f}"
    )
    print(format_table(["", "frames/s"], list(result["frames_per_s"].items())))
    wanted = {target["ratio"]: target for target in result["targets"]}
    rows = []
    for name, value in result["ratios"].items():
        target = wanted.get(name)
        verdict = "" if target is None else ("met" if target["met"] else "missed")
        rows.append([name, value, target["least"] if target else None, verdict])
    print(format_table(["", "ratio", "target", ""], rows), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="tiny", help="tiny, medium or the path of a config.json")
    parser.add_argument("--num-threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        make_checkpoint(Path(name), arguments.size)
        results = [
            result
            for num_threads in arguments.num_threads
            for result in measure(
                Path(name), num_threads=num_threads, num_rounds=arguments.num_rounds
            )
        ]
    if arguments.json:
        write_json(arguments.json, {"results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
