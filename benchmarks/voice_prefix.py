"""First audio of a voice whose prompt is pinned in the KV cache, against one whose prompt is not.

Two voices with clips of equal length take turns on one engine with a random float32 checkpoint on
one core, greedily, with EOS out of reach. Before each turn other voices come, each twice, and fill
the cache. The clips bring their codes, so what is not in the cache costs its prefill and no encoding.

    python -m benchmarks.voice_prefix
    python -m benchmarks.voice_prefix --size tiny --clip-frames 100 --json out.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks._engine import make_core, run_to_end
from benchmarks._report import circumstances, format_table, write_json
from benchmarks._timing import ratio
from benchmarks.vs_transformers import GREEDY, make_checkpoint
from vllm.checkpoint_config import HiggsAudioConfig
from vllm.outputs import FinishReason
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.messages import ClipData, EngineCoreRequest

SYSTEM_LEN, TRANSCRIPT_LEN, TEXT_LEN = 40, 40, 30  # positions
BLOCK_SIZE = 16
NUM_REQUESTS = 5  # that the cache holds: a quarter of it has room for one voice, which is pinned
NUM_OTHERS = 6  # which fill it
NUM_FRAMES = 60  # more than the first audio needs
NUM_CODES = 1024


@dataclass(frozen=True)
class Turn:
    """One request: what it found, and how long its prompt and its first audio took."""

    num_cached: int
    prefill_s: float
    first_audio_s: float


class Traffic:
    """Requests for voices that are told apart by their seed.

    Args:
        core: a warm engine.
        num_clip_frames: of every voice.
    """

    def __init__(self, core: EngineCore, num_clip_frames: int) -> None:
        self._core = core
        self._num_clip_frames = num_clip_frames
        self._names = count()

    def turn(self, voice: int, *, is_pinned: bool) -> Turn:
        """Speak until the first audio; the text is one that was never spoken before."""
        request = self._request(voice, num_frames=NUM_FRAMES, is_pinned=is_pinned)
        start = time.perf_counter()
        self._core.add_request(request)
        first_audio_s, stats = 0.0, None
        while stats is None:
            for output in self._core.step().outputs:
                if output.audio and not first_audio_s:
                    first_audio_s = time.perf_counter() - start
                    self._core.abort_requests((request.request_id,), FinishReason.ABORT)
                stats = output.stats
        if not first_audio_s:
            raise RuntimeError("a request ended without audio")
        return Turn(stats.num_cached_positions, stats.prefill_time_s, first_audio_s)

    def fill(self, voices: Sequence[int]) -> None:
        """Prefill others, each twice, so that the cache takes their voices for shared ones."""
        for voice in voices:
            for _ in range(2):
                run_to_end(self._core, [self._request(voice, num_frames=2, is_pinned=False)])

    def _request(self, voice: int, *, num_frames: int, is_pinned: bool) -> EngineCoreRequest:
        num = next(self._names)
        num_codebooks = self._core.info.num_codebooks
        rng = np.random.default_rng(voice)
        codes = rng.integers(0, NUM_CODES, (num_codebooks, self._num_clip_frames))
        slots = np.zeros(self._num_clip_frames + num_codebooks + 1, np.int32)  # delayed frames
        system = np.arange(SYSTEM_LEN) + 100  # of all voices
        transcript = rng.integers(100, 190, TRANSCRIPT_LEN)
        text = np.random.default_rng((voice, num)).integers(100, 190, TEXT_LEN)
        ids = np.concatenate([system, transcript, slots, text])
        start = SYSTEM_LEN + TRANSCRIPT_LEN
        clip = ClipData(start, self._num_clip_frames, codes=codes.astype(np.int16).tobytes())
        return EngineCoreRequest(
            request_id=f"{voice}, {num}",
            prompt_token_ids=ids.astype(np.int32).tobytes(),
            sampling_params=SamplingParams(**GREEDY),
            seed=num,
            frame_limit=num_frames,
            limit_reason=FinishReason.LENGTH,
            clips=(clip,),
            num_pinned_positions=start + len(slots) if is_pinned else 0,
        )


def measure(checkpoint: Path, *, num_clip_frames: int, num_rounds: int) -> dict[str, Any]:
    """Turns of both voices, round by round, one of them pinned."""
    config = HiggsAudioConfig.from_folder(checkpoint / "lm")
    num_slots = num_clip_frames + config.num_codebooks + 1
    num_prompt = SYSTEM_LEN + TRANSCRIPT_LEN + num_slots + TEXT_LEN
    position_bytes = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    core = make_core(
        checkpoint,
        decodes_audio=True,
        cpu_threads=1,
        block_size=BLOCK_SIZE,
        max_model_len=num_prompt + NUM_FRAMES,
        kv_cache_memory=NUM_REQUESTS * (num_prompt + NUM_FRAMES) * position_bytes,
    )
    traffic = Traffic(core, num_clip_frames)
    turns: dict[str, list[Turn]] = {"pinned": [], "not pinned": []}
    others = count(len(turns))
    for round_idx in tqdm(range(-1, num_rounds), desc="rounds", unit="round"):
        names = list(turns) if round_idx % 2 == 0 else list(reversed(turns))
        for name in names:
            traffic.fill([next(others) for _ in range(NUM_OTHERS)])
            turn = traffic.turn(list(turns).index(name), is_pinned=name == "pinned")
            if round_idx >= 0:
                turns[name].append(turn)
    result = {"num_prompt": num_prompt, "num_kv_blocks": core.info.num_kv_blocks}
    core.shutdown()
    return result | {name: [vars(turn) for turn in each] for name, each in turns.items()}


def print_results(result: dict[str, Any]) -> None:
    rows = []
    for name in ("pinned", "not pinned"):
        columns = {key: [turn[key] for turn in result[name]] for key in result[name][0]}
        found = f"{median(columns['num_cached']):.0f}"
        rows.append(
            [name, found, *(1000 * median(columns[key]) for key in ("prefill_s", "first_audio_s"))]
        )
    print(format_table(["voice", "positions found", "prefill ms", "first audio ms"], rows))
    times = {
        name: [turn["first_audio_s"] for turn in result[name]] for name in ("pinned", "not pinned")
    }
    print(
        f"first audio of {result['num_prompt']} positions, in a cache of "
        f"{result['num_kv_blocks']} blocks of {BLOCK_SIZE}: not pinned takes "
        f"{ratio(times['not pinned'], times['pinned']):.3g} times as long"
    )
    print(f"load average {circumstances()['load_average'][0]}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="medium", help="of the random checkpoint")
    parser.add_argument("--clip-frames", type=int, default=250, help="25 are a second")
    parser.add_argument("--num-rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), arguments.size)
        result = measure(
            Path(folder), num_clip_frames=arguments.clip_frames, num_rounds=arguments.num_rounds
        )
    print_results(result)
    if arguments.json:
        write_json(arguments.json, {"result": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
