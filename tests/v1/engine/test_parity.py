"""The whole engine against transformers' ``generate`` and codec, frame by frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import HiggsAudioV2ForConditionalGeneration

from vllm import LLM, SamplingParams, SpeechPrompt
from vllm.checkpoint_config import HiggsAudioConfig
from vllm.model_executor.framing import DelayPattern

pytestmark = pytest.mark.usefixtures("decode_path")

NUM_FRAMES = 200
GREEDY = SamplingParams(
    temperature=0.0, ras_window_length=0, max_tokens=NUM_FRAMES, eos_rule="reference"
)


@pytest.fixture(scope="module")
def conversation(checkpoint: Path) -> tuple[list[int], np.ndarray]:
    """Ids of text, a clip of 12 frames and text again, and the clip's codes [K, T]."""
    config = HiggsAudioConfig.from_folder(checkpoint / "lm")
    codes = np.random.default_rng(3).integers(0, 1024, (8, 12)).astype(np.int16)
    slots = [config.audio_token_id] * (12 + 8 + 1)
    opening = config.audio_out_bos_token_id
    return [*range(20, 50), opening, *slots, *range(60, 75), opening], codes


def generate_reference(
    folder: Path, ids: list[int], codes: np.ndarray, num_frames: int
) -> np.ndarray:
    """Delayed frames [n, K] of transformers' greedy ``generate``."""
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for name in ("ras_win_len", "ras_win_max_num_repeat"):
        if hasattr(model.generation_config, name):
            delattr(model.generation_config, name)
    frames = DelayPattern(8, 1024, 1025).apply(codes)
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            audio_input_ids=torch.from_numpy(frames.astype(np.int64))[None],
            audio_input_ids_mask=torch.ones(1, len(frames), dtype=torch.bool),
            max_new_tokens=num_frames,
            do_sample=False,
        )
    return output[0, len(frames) :].numpy()


def make_llm(folder: Path, tmp_path: Path, lm: Path | None = None) -> LLM:
    return LLM(
        model=lm or folder / "lm",
        audio_tokenizer=folder / "codec",
        device="cpu",
        dtype="float32",
        max_num_seqs=4,
        max_model_len=512,
        cpu_threads=1,
        clip_cache_dir=str(tmp_path / "clips"),
    )


@pytest.mark.parametrize("layout", ["boson", "transformers"])
def test_greedy_frames_equal_generate(
    checkpoints: dict[str, Path],
    conversation: tuple[list[int], np.ndarray],
    tmp_path: Path,
    layout: str,
) -> None:
    ids, codes = conversation
    llm = make_llm(checkpoints[layout], tmp_path)
    prompt = SpeechPrompt(prompt_token_ids=ids, prompt_codes=[codes])
    out = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
    llm.shutdown()

    expected = generate_reference(checkpoints["transformers"] / "lm", ids, codes, NUM_FRAMES)
    np.testing.assert_array_equal(out.delayed_codes, expected)
    assert out.finish_reason == "length"
    assert out.codes.shape == (8, NUM_FRAMES - 8)
    assert out.usage.prompt_tokens == len(ids)


def test_end_of_speech_and_audio_equal_the_reference(
    checkpoint: Path,
    conversation: tuple[list[int], np.ndarray],
    reference_codec_class: type,
    tmp_path: Path,
) -> None:
    """EOS comes of itself: its rows of the head are those of codes that are sure to be drawn."""
    ids, codes = conversation
    folder = tmp_path / "ending"
    folder.mkdir()
    for file in (checkpoint / "lm").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    head = weights["audio_lm_head.weight"]
    unending = generate_reference(checkpoint / "lm", ids, codes, 60)
    for k in range(8):
        head[k * 1026 + 1025] = head[k * 1026 + int(unending[40 + k, k])] * 1.02
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    llm = make_llm(checkpoint, tmp_path, folder)
    prompt = SpeechPrompt(prompt_token_ids=ids, prompt_codes=[codes])
    out = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
    llm.shutdown()
    expected = generate_reference(folder, ids, codes, NUM_FRAMES)

    assert out.finish_reason == "stop"
    assert len(expected) < NUM_FRAMES
    np.testing.assert_array_equal(out.delayed_codes, expected)
    real = DelayPattern(8, 1024, 1025).undo(expected, ended=True)
    np.testing.assert_array_equal(out.codes, real)
    codec = reference_codec_class.from_pretrained(checkpoint / "codec").eval()
    with torch.inference_mode():
        audio = codec.decode(torch.from_numpy(real.astype(np.int64))[None]).audio_values[0, 0]
    np.testing.assert_allclose(out.audio, audio.numpy().clip(-1, 1), atol=1e-5)
