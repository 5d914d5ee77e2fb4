"""The comparison with vLLM on the CPU, with a stand-in for the peer's process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks import vs_vllm_cpu
from benchmarks._llama import make_llama
from benchmarks.vs_vllm_cpu import (
    Ours,
    Peer,
    PeerSetup,
    Settings,
    compare,
    make_models,
    measure,
    print_results,
)
from vllm.checkpoint_config import HiggsAudioConfig

STAND_IN = """
import json, sys
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    turn = json.loads(line)
    assert len({tuple(prompt) for prompt in turn["prompts"]}) == len(turn["prompts"])
    print(json.dumps([1e3] * turn["num_steps"]), flush=True)
"""
SETUP = PeerSetup("float32", 1)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vs_vllm_cpu, "peer_environment", lambda *_: {})


def make_peer(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> Peer:
    file = folder / "stand_in.py"
    file.write_text(program, encoding="utf-8")
    monkeypatch.setattr(vs_vllm_cpu, "PEER", file)
    return Peer(Path(sys.executable), folder, SETUP, 2)


@pytest.mark.usefixtures("environment")
def test_both_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_models(tmp_path, "tiny")
    peer = make_peer(tmp_path, monkeypatch, STAND_IN)
    ours = Ours(tmp_path, "float32", max_num_seqs=8, num_threads=1)
    peer.wait_ready()
    turns = {"float32": ours.turn}
    result = measure(turns, {SETUP: peer.turn}, Settings("tiny", 8, 3, "wall"), num_rounds=2)
    ours.close()
    peer.close()
    assert result["seconds"]["peer float32:1"] == 1e3
    assert result["seconds"]["ours float32"] > 0
    print_results([result])
    assert "aim met" in capsys.readouterr().out


@pytest.mark.usefixtures("environment")
def test_a_peer_that_ends_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = make_peer(tmp_path, monkeypatch, "raise SystemExit('no such wheel')")
    with pytest.raises(RuntimeError, match="no such wheel"):
        peer.wait_ready()
    peer.close()


def test_the_fastest_setup_of_the_peer_counts() -> None:
    seconds = {
        "ours float32": [1.0, 2.0],
        "ours int8": [0.5, 1.0],
        "peer float32:1": [4.0, 8.0],
        "peer float32:2": [3.0, 6.0],
        "peer bfloat16:1": [2.0, 4.0],
    }
    found = {
        (each["ours"], each["best"]): (each["ratio"], each["targets"])
        for each in compare(seconds, "tiny", batch_size=8)
    }
    assert found == {
        ("float32", "peer float32:2"): (3.0, (1.3, 2)),
        ("int8", "peer float32:2"): (6.0, None),
        ("int8", "peer bfloat16:1"): (4.0, (3, 5)),
    }
    at_the_memory = compare(seconds, "medium", batch_size=1)
    assert [each["targets"] for each in at_the_memory] == [(1.05, 1.2), (2.5, 4), None]


@pytest.mark.parametrize("text", ["float32", "float16:1", "int8:two", "int8:"])
def test_what_is_no_setup_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="float32:1"):
        PeerSetup.parse(text)


def test_the_peers_model_is_one_that_transformers_knows(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    make_models(tmp_path, "tiny")
    config = HiggsAudioConfig.from_folder(tmp_path / "lm")
    model, loading = LlamaForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.config.vocab_size == 8 * 1026
    assert model.config.num_hidden_layers == config.num_hidden_layers
    with pytest.raises(FileExistsError):
        make_llama(tmp_path / "llama", config)
