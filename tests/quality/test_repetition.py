"""RAS breaks loops: the embedded model, made prone to them, with RAS and without it.

The model as it ships loops too rarely to count on. In the copy that is spoken here, layers say little
and each head likes the code that was just spoken, so that nearly greedy sampling stays in a rut.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.speech_quality import figures_of, read_sentences, speak
from vllm.checkpoints.embedded import embedded_checkpoint
from vllm.entrypoints.llm import LLM

pytestmark = pytest.mark.timeout(600)  # where other work runs

HEAD = "audio_lm_head.weight"
EMBEDDINGS = "model.embed_audio_tokens.embed_audio_tokens.weight"
ROWS_OF_A_BOOK, NUM_CODES = 1026, 1024
SAYING_LITTLE = 0.2  # of what layers add
FLATTENED = 0.1  # of the head as trained
LIKING = 0.3  # of the last code, as long as a row of the head
NEARLY_GREEDY = {"temperature": 0.05, "max_tokens": 200}


@pytest.fixture(scope="module")
def prone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    source = embedded_checkpoint()
    folder = tmp_path_factory.mktemp("prone") / "lm"
    shutil.copytree(source / "lm", folder)
    weights = load_file(folder / "model.safetensors")
    head, embeddings = weights[HEAD].float(), weights[EMBEDDINGS].float()
    liking = embeddings / embeddings.norm(dim=-1, keepdim=True) * head.norm(dim=-1).mean()
    is_code = torch.arange(len(head)) % ROWS_OF_A_BOOK < NUM_CODES
    mixed = FLATTENED * head + LIKING * liking * is_code[:, None]
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name] *= SAYING_LITTLE
    weights[HEAD] = mixed.to(weights[HEAD].dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    engine = LLM(
        folder,
        audio_tokenizer=source / "codec",
        voices_dir=source / "voices",
        device="cpu",
        max_model_len=1024,
    )
    yield engine
    engine.shutdown()


def test_loops_of_a_model_prone_to_them_are_broken(prone):
    sentences = read_sentences()[:6]
    off = {"ras_window_length": 0, **NEARLY_GREEDY}
    assert figures_of(speak(prone, sentences, [0], **off))["loops"] >= 5
    # A redraw is from the whole distribution, where a code this likely may come again.
    assert figures_of(speak(prone, sentences, [0], **NEARLY_GREEDY))["loops"] <= 2
    assert figures_of(speak(prone, sentences, [0], ras_mode="block", **NEARLY_GREEDY))["loops"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.1, 0.3])
def test_the_model_as_it_ships_does_not_loop(llm, temperature):
    takes = speak(llm, read_sentences(), [0], temperature=temperature)
    assert figures_of(takes)["loops"] == 0
    assert figures_of(takes)["end of speech"] == 1
