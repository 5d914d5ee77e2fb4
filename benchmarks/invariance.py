"""Whether each request's codes are those of its solo run, whatever else the engine does.

Every request runs alone first, in an engine without a prefix cache. Then all of them run in one
whose pages are scarce and whose prefill steps are small, with arrivals and cancellations at random:
so buckets change, prompts are cut, pages are shared, rows are swapped out and used again. Codes
must be equal to the bit; of a cancelled request, as far as they go. A leaking state, a stale page
or a race shows here and nowhere else.

    python -m benchmarks.invariance
    python -m benchmarks.invariance --model higgs-audio-random --num-requests 64 --json out.json
    python -m benchmarks.invariance --model FOLDER --codec FOLDER --device cuda --max-num-seqs 64
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._report import format_table, write_json
from vllm.checkpoint_config import HiggsAudioConfig
from vllm.config import EngineConfig
from vllm.outputs import FinishReason
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.messages import EngineCoreRequest

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BLOCK_SIZE = 16
_PROMPT_LENS = (9, 40, 100, 130)  # positions; the longest is cut, and shares pages
_FIRST_ID, _NUM_IDS = 10, 60  # of ordinary tokens in every vocabulary
_MAX_FRAMES = 90
_MAX_LEN = 256  # positions
_ARRIVAL, _CANCELLATION = 0.3, 0.02  # chances per step
_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.8, "ras_window_length": 0},
    {"ras_mode": "block"},
    {"eos_rule": "reference"},
)

MakeCore = Callable[..., EngineCore]


@dataclass(frozen=True)
class Report:
    """What the mixed run did, and which requests came out of it changed."""

    num_requests: int
    num_steps: int
    num_cancelled: int
    num_preemptions: int
    num_cached_positions: int
    largest_batch: int
    changed: tuple[str, ...]

    @property
    def is_invariant(self) -> bool:
        return not self.changed


def check_invariance(
    make_core: MakeCore, *, num_requests: int, max_num_seqs: int, seed: int = 0
) -> Report:
    """Compare solo runs with a mixed one.

    Args:
        make_core: takes options of ``EngineConfig.from_options`` and returns a warm engine.
        num_requests: in all.
        max_num_seqs: that run together at most.
        seed: of requests, arrivals and cancellations.

    Raises:
        RuntimeError: a request failed.
    """
    options: dict[str, Any] = {
        "max_num_seqs": max_num_seqs,
        "max_model_len": _MAX_LEN,
        "block_size": _BLOCK_SIZE,
    }
    requests = make_requests(num_requests, seed)
    solo_core = make_core(**options, enable_prefix_caching=False)
    try:
        # Pages for a third of the rows, so that some have to be swapped out.
        num_blocks = max(max_num_seqs * _MAX_LEN // (6 * _BLOCK_SIZE), _MAX_LEN // _BLOCK_SIZE + 1)
        kv_bytes = num_blocks * _block_bytes(solo_core)
        expected = {each.request_id: _run_alone(solo_core, each) for each in requests}
    finally:
        solo_core.shutdown()
    mixed_core = make_core(**options, kv_cache_memory=kv_bytes, max_num_batched_tokens=48)
    try:
        return _run_mixed(mixed_core, requests, expected, seed)
    finally:
        mixed_core.shutdown()


def make_requests(num_requests: int, seed: int) -> list[EngineCoreRequest]:
    """Requests of all kinds: greedy and drawn, short and long, with equal and different prompts."""
    rng = random.Random(seed)
    requests = []
    for index in range(num_requests):
        ids = _FIRST_ID + (rng.choice([0, 0, 30]) + np.arange(rng.choice(_PROMPT_LENS))) % _NUM_IDS
        requests.append(
            EngineCoreRequest(
                request_id=f"r{index}",
                prompt_token_ids=ids.astype(np.int32).tobytes(),
                sampling_params=SamplingParams(**rng.choice(_SETTINGS)),
                seed=rng.randrange(2**64),
                frame_limit=rng.randint(12, _MAX_FRAMES),
                limit_reason=FinishReason.LENGTH,
            )
        )
    return requests


def _block_bytes(core: EngineCore) -> int:
    config = HiggsAudioConfig.from_folder(Path(core.info.model_folder))
    width = 2 * config.num_key_value_heads * config.head_dim * _BYTES[core.info.dtype]
    return _BLOCK_SIZE * config.num_hidden_layers * width


def _run_alone(core: EngineCore, request: EngineCoreRequest) -> bytes:
    core.add_request(request)
    codes = b""
    while core.has_work():
        for output in core.step().outputs:
            _check(output.error)
            codes += output.delayed_codes
    return codes


def _run_mixed(
    core: EngineCore,
    requests: Sequence[EngineCoreRequest],
    expected: dict[str, bytes],
    seed: int,
) -> Report:
    rng = random.Random(seed + 1)
    waiting = list(requests)
    codes = dict.fromkeys(expected, b"")
    ended: set[str] = set()
    cancelled: set[str] = set()
    figures: Counter[str] = Counter()
    stats = None
    while waiting or core.has_work():
        if waiting and rng.random() < _ARRIVAL:
            core.add_request(waiting.pop(0))
        if rng.random() < _CANCELLATION and len(cancelled) < len(requests) // 4:
            open_ids = [name for name in codes if codes[name] and name not in ended]
            if open_ids:
                victim = rng.choice(open_ids)
                cancelled.add(victim)
                core.abort_requests((victim,))
        outputs = core.step()
        core.check_integrity()
        stats = outputs.stats.scheduler
        figures["steps"] += 1
        figures["largest_batch"] = max(figures["largest_batch"], stats.num_running)
        for output in outputs.outputs:
            _check(output.error)
            codes[output.request_id] += output.delayed_codes
            if output.finish_reason is not None:
                ended.add(output.request_id)
    assert stats is not None
    return Report(
        num_requests=len(requests),
        num_steps=figures["steps"],
        num_cancelled=len(cancelled),
        num_preemptions=stats.num_preemptions,
        num_cached_positions=stats.prefix_cache_hits,
        largest_batch=figures["largest_batch"],
        changed=tuple(
            name
            for name, made in codes.items()
            if made != (expected[name][: len(made)] if name in cancelled else expected[name])
        ),
    )


def _check(error: str | None) -> None:
    if error is not None:
        raise RuntimeError(error)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    base = EngineConfig.from_options(
        model=args.model,
        audio_tokenizer_type=args.codec,
        device=args.device,
        enforce_eager=args.enforce_eager,
    )

    def make_core(**options: Any) -> EngineCore:
        parts = {
            "cache": ("block_size", "enable_prefix_caching", "kv_cache_memory"),
            "model": ("max_model_len",),
            "scheduler": ("max_num_seqs", "max_num_batched_tokens"),
        }
        changed = {
            part: replace(getattr(base, part), **{n: options[n] for n in names if n in options})
            for part, names in parts.items()
        }
        return EngineCore(replace(base, **changed))

    report = check_invariance(
        make_core,
        num_requests=args.num_requests,
        max_num_seqs=args.max_num_seqs,
        seed=args.seed,
    )
    figures = asdict(report)
    print(format_table(["", "value"], [[name, str(value)] for name, value in figures.items()]))
    if args.json:
        write_json(args.json, figures)
    print("every request equals its solo run" if report.is_invariant else "REQUESTS CHANGED")
    return 0 if report.is_invariant else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="as of vllm serve; default: the embedded one")
    parser.add_argument("--codec", help="as --audio-tokenizer-type of vllm serve")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--num-requests", type=int, default=24)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
