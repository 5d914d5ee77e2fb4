"""Both published configurations read alike; what cannot be built is refused by name."""

import pytest

from vllm.checkpoint_config import HiggsAudioConfig
from vllm.exceptions import CheckpointError

DECODER = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
BOSON = {
    "architectures": ["HiggsAudioModel"],
    "model_type": "higgs_audio",
    "audio_dual_ffn_layers": list(range(28)),
    "audio_num_codebooks": 8,
    "audio_codebook_size": 1024,
    "audio_stream_bos_id": 1024,
    "audio_stream_eos_id": 1025,
    "audio_in_token_idx": 128015,
    "audio_out_token_idx": 128016,
    "audio_out_bos_token_id": 128013,
    "audio_eos_token_id": 128012,
    "use_audio_out_self_attention": 0,
    "torch_dtype": "bfloat16",
    "text_config": DECODER
    | {
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}
TRANSFORMERS = DECODER | {
    "architectures": ["HiggsAudioV2ForConditionalGeneration"],
    "model_type": "higgs_audio_v2",
    "num_codebooks": 8,
    "codebook_size": 1026,
    "audio_token_id": 128016,
    "audio_bos_token_id": 128013,
    "audio_delay_token_id": 128014,
    "audio_stream_bos_id": 1024,
    "audio_stream_eos_id": 1025,
    "bos_token_id": 1,
    "eos_token_id": 128009,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 0.125,
        "high_freq_factor": 0.5,
        "original_max_position_embeddings": 1024,
    },
    "dtype": "bfloat16",
}


@pytest.mark.parametrize(("raw", "layout"), [(BOSON, "boson"), (TRANSFORMERS, "transformers")])
def test_published_configurations(raw, layout):
    config = HiggsAudioConfig.from_dict(raw)
    assert config.layout == layout
    assert config.architecture == raw["architectures"][0]
    assert config.dtype == "bfloat16"
    assert (config.num_codebooks, config.codebook_size) == (8, 1026)
    assert (config.stream_bos_id, config.stream_eos_id) == (1024, 1025)
    assert config.audio_placeholder_ids == {128014, 128015, 128016}
    assert config.audio_out_bos_token_id == 128013
    assert config.audio_eos_token_id == 128012
    assert (config.hidden_size, config.head_dim, config.rope_theta) == (3072, 128, 500000.0)
    assert config.rope_scaling is not None


def test_published_ids_beyond_a_small_vocabulary_are_left_out():
    ids = {"audio_token_id": 90, "audio_bos_token_id": 91, "audio_delay_token_id": 92}
    raw = TRANSFORMERS | ids | {"vocab_size": 100, "eos_token_id": 2}
    config = HiggsAudioConfig.from_dict(raw)
    assert config.audio_placeholder_ids == {90, 92}
    assert config.audio_eos_token_id is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_size": 1024}, "no room for audio_stream_eos_id=1025"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"num_key_value_heads": 7}, "must be a multiple of num_key_value_heads=7"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"audio_token_id": 128256}, "audio_token_id=128256 must be below vocab_size"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=message):
        HiggsAudioConfig.from_dict(TRANSFORMERS | change)


@pytest.mark.parametrize(
    "change", [{"audio_embed_avg": True}, {"audio_dual_ffn_layers": [0, 1]}, {"text_config": None}]
)
def test_original_switches_that_change_the_network_are_refused(change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        HiggsAudioConfig.from_dict(BOSON | change)


def test_folder_without_or_with_broken_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        HiggsAudioConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        HiggsAudioConfig.from_folder(tmp_path)
