"""vLLM-CPU in a process of its own, which takes decode steps when it is told to.

Runs under the peer's interpreter, so it imports nothing of this repository: its package has the
same name as ours. Reads a JSON line per turn from standard input and answers with one.

    PEER_PYTHON -I _vllm_cpu_peer.py FOLDER DTYPE MAX_NUM_SEQS < turns
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}


def make_engine(folder: str, dtype: str, max_num_seqs: int) -> Any:
    """An engine in this process, compiled, without tokenizer and without a prefix cache."""
    from vllm import LLM

    model = LLM(
        model=folder,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    return model.llm_engine


def take_turn(engine: Any, turn: dict[str, Any]) -> list[float]:
    """Seconds of each step that decodes all requests of a turn, after some that do not count."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=turn["max_tokens"]
    )
    names = [f"{turn['index']}-{index}" for index in range(len(turn["prompts"]))]
    for name, ids in zip(names, turn["prompts"], strict=True):
        engine.add_request(name, {"prompt_token_ids": ids}, params)
    # All prompts fit into the first step, so every step after it decodes.
    for _ in range(1 + turn["num_warm_steps"]):
        outputs = step(engine)
    assert len(outputs) == len(names), f"{len(outputs)} of {len(names)} requests are decoding"
    clock = CLOCKS[turn["clock"]]
    seconds = []
    for _ in range(turn["num_steps"]):
        start = clock()
        outputs = step(engine)
        seconds.append(clock() - start)
        assert len(outputs) == len(names), f"{len(outputs)} of {len(names)} requests are decoding"
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return seconds


def step(engine: Any) -> list[Any]:
    """One step of the engine's core, without what the front end makes of it."""
    outputs: list[Any] = engine.engine_core.get_output().outputs
    return outputs


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the peer prints is no answer
    folder, dtype, max_num_seqs = sys.argv[1:]
    engine = make_engine(folder, dtype, int(max_num_seqs))
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        print(json.dumps(take_turn(engine, json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
