"""The way of a card, taken without one: from loading to what a stream says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm.checkpoints.make_codec import make_codec
from vllm.checkpoints.make_model import make_model

SIZES = {
    **{"model_type": "higgs_audio_v2", "vocab_size": 512, "hidden_size": 64},
    **{"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 16, "num_codebooks": 8, "codebook_size": 66},
    **{"audio_stream_bos_id": 64, "audio_stream_eos_id": 65, "audio_token_id": 500},
    **{"audio_bos_token_id": 501, "audio_delay_token_id": 502, "bos_token_id": 1},
    **{"eos_token_id": 2, "pad_token_id": 3},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def run(repo_root: Path, *arguments: str) -> Any:
    """What the program found out."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("absent_card.py")), *arguments],
        cwd=repo_root,
        env=environment | {"PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def launched(repo_root: Path) -> dict[str, Any]:
    """Of engines with most of the options that cards have."""
    found: dict[str, Any] = run(repo_root, "launches")
    return found


def test_steps_record_nothing_that_a_graph_cannot_hold(launched: dict[str, Any]) -> None:
    """No wait, no copy from or to the host, no pinned memory, and no kernel that has to be built."""
    assert launched["held"] == []
    graphs = launched["graphs"]
    assert graphs.pop("eager") == 0
    steps = graphs.pop("prefetch")
    assert steps > 20
    assert graphs.pop("default") > steps, "windows of the codec are recorded too"
    assert set(graphs.values()) == {steps}


def test_whatever_engines_launch_is_built_ahead(launched: dict[str, Any]) -> None:
    """Built one by one while a lent card waits, the kernels take minutes."""
    assert launched["late"] == []
    assert launched["ahead"]["convolve_kernel"] > 20
    assert launched["ahead"]["linear_kernel"] > 40


@pytest.mark.slow
def test_codes_are_those_of_a_cpu(repo_root: Path, tmp_path: Path) -> None:
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps(SIZES))
    make_model(tmp_path / "lm", layout="transformers", size=str(sizes), seed=5)
    make_codec(tmp_path / "codec", layout="transformers", size="tiny", seed=5)
    pairs = run(repo_root, "codes", str(tmp_path)).values()
    assert len(pairs) == 4
    # A draw on the border between two codes may fall on either side, and changes all that follow.
    assert sum(on_cpu == on_card for on_cpu, on_card in pairs) >= 3
    assert len({on_cpu for on_cpu, _ in pairs}) == 4, "they all say the same"
