"""How the KV cache is sized, on a host and on a card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vllm.checkpoints.make_model import _template
from vllm.exceptions import ConfigError
from vllm.model_executor.models.higgs_audio import HiggsAudioModel
from vllm.v1.worker.cuda_graphs import batch_buckets, context_tiers
from vllm.v1.worker.memory import CardMemory, KVBudget, StepSizes, num_kv_blocks

SIZES = {
    "bytes_per_block": 1000,
    "block_size": 16,
    "max_model_len": 160,
    "max_num_seqs": 4,
    "requested_bytes": 0,
}


def test_a_host_gives_half_of_what_is_free() -> None:
    assert num_kv_blocks(KVBudget.of_host(50_000, **SIZES)) == 25


def test_no_more_than_all_requests_of_full_length_can_use() -> None:
    assert num_kv_blocks(KVBudget.of_host(10**9, **SIZES)) == 40


def test_what_is_asked_for_needs_no_budget() -> None:
    sizes = SIZES | {"requested_bytes": 12_345}
    assert num_kv_blocks(KVBudget.of_host(0, **sizes)) == 12


CARD = CardMemory(
    total_bytes=24 * 2**30,
    utilization=0.5,
    used_bytes=10 * 2**30,
    sizes=StepSizes(
        num_graphs=64,
        max_rows=1024,
        widest_row=2**15,
        bytes_per_number=2,
        num_codec_graphs=48,
        codec_batch=32,
        codec_samples=2**15,
    ),
)


def test_a_card_gives_what_weights_graphs_and_codec_leave() -> None:
    graphs, steps, codec = (64 * 8 + 48 * 2) * 2**20, 3 * 2**26, 2**20 * 512
    assert CARD.available_bytes == 2 * 2**30 - graphs - steps - codec
    assert num_kv_blocks(KVBudget.of_card(CARD, **SIZES | {"max_num_seqs": 10**9})) == (
        CARD.available_bytes // 1000
    )


def test_a_card_that_is_too_small_is_told_with_the_arithmetic() -> None:
    small = replace(CARD, used_bytes=12 * 2**30)
    with pytest.raises(ConfigError) as caught:
        num_kv_blocks(KVBudget.of_card(small, **SIZES))
    message = str(caught.value)
    assert "24.00 GiB on the card x 0.5 - 12.00 GiB in use" in message
    assert "0.59 GiB for 64 graphs and 48 of the codec" in message
    assert "= -1.28 GiB" in message
    assert "--gpu-memory-utilization" in message


def test_the_published_model_fits_a_budget_of_24e9_bytes() -> None:
    """64 sequences of 1,050 positions, with two billion bytes for CUDA and the codec's weights."""
    max_num_seqs, max_model_len, block_size = 128, 8192, 16
    with torch.device("meta"):
        model = HiggsAudioModel(_template("3b"), dtype=torch.bfloat16, max_model_len=max_model_len)
    weights = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    assert 10.7e9 < weights < 10.9e9  # 5.38 G weights, without the text head
    spec = model.spec
    assert spec.kv_bytes_per_position(torch.bfloat16) == 114_688
    graphs = len(batch_buckets(max_num_seqs)) * len(context_tiers(max_model_len))
    memory = CardMemory(
        total_bytes=24 * 10**9,
        utilization=1.0,
        used_bytes=weights + 2 * 10**9,
        sizes=StepSizes(
            num_graphs=graphs,
            max_rows=1024,
            widest_row=model.largest_matrix // spec.hidden_size,
            bytes_per_number=2,
            num_codec_graphs=48,
            codec_batch=32,
            codec_samples=45 * 960,
        ),
    )
    num_blocks = num_kv_blocks(
        KVBudget.of_card(
            memory,
            bytes_per_block=spec.kv_bytes_per_position(torch.bfloat16) * block_size,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            requested_bytes=0,
        )
    )
    assert num_blocks // -(-1050 // block_size) >= 64
