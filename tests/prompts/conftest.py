"""A small checkpoint folder with tokenizer, template and config, and its prompt builder."""

from __future__ import annotations

import pytest

from vllm.checkpoint_config import HiggsAudioConfig
from vllm.checkpoints.make_tokenizer import make_tokenizer
from vllm.prompts import HiggsAudioPromptBuilder, TextTokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return TextTokenizer.from_folder(tokenizer_folder)


@pytest.fixture(scope="session")
def config(tokenizer):
    return HiggsAudioConfig.from_dict(
        {
            "model_type": "higgs_audio_v2",
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_codebooks": 8,
            "codebook_size": 1026,
            "audio_stream_bos_id": 1024,
            "audio_stream_eos_id": 1025,
            "audio_token_id": tokenizer.token_id("<|AUDIO_OUT|>"),
            "audio_bos_token_id": tokenizer.token_id("<|audio_out_bos|>"),
            "audio_delay_token_id": tokenizer.token_id("<|reserved_special_token_6|>"),
        }
    )


@pytest.fixture(scope="session")
def builder(tokenizer, config):
    return HiggsAudioPromptBuilder(tokenizer, config)
