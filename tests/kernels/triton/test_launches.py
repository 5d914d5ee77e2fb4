"""Whether Triton takes every launch as it stands, for a card that is not here.

The interpreter takes any option and any argument; a card's launcher does not, and it builds a
kernel anew for whatever it tells apart. So everything is launched once more in a process without
the interpreter, whose driver says it has an sm_90 and where nothing is compiled or run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
from collections import Counter

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm.kernels.pair_wave_decoder import PairWaveDecoder
from vllm.kernels.quantize import QuantizedWeight, WeightFormat
from vllm.kernels.sampler import DeviceSampler
from vllm.kernels.skinny_linear import (
    LinearWorkspace, ResidualRows, embed_frames, gated_linear, normed_linear, residual_linear
)
from vllm.kernels.triton import decode_attention, prefill_attention, rope_write_kv
from vllm.model_executor.codecs.higgs import HiggsCodec, HiggsCodecConfig
from vllm.model_executor.framing import DelayPattern
from vllm.model_executor.heads import CodebookState
from vllm.v1.worker.cuda_graphs import batch_buckets


class Card:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


built = Counter()  # kernel -> how often it would have been built
keys = set()


def note(self, key, signature, device, constexprs, options, attrs, warmup):
    name = self.__name__
    if (name, key) not in keys:
        keys.add((name, key))
        built[name] += 1
    return None  # so nothing is run


driver.set_active(Card())
JITFunction._do_compile = note
cpu, bf16 = torch.device("cpu"), torch.bfloat16
MAX_ROWS = 256
SHAPES = [(5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192), (8208, 3072)]


def matrix(shape, is_fp8):
    if not is_fp8:
        return torch.empty(shape, dtype=bf16)
    values = torch.empty(shape, dtype=torch.float8_e4m3fn)
    return QuantizedWeight(WeightFormat.FP8, values, torch.empty(shape[0]))


def products(is_fp8, counts, first=0):
    product = torch.float16 if is_fp8 else bf16
    space = LinearWorkspace(SHAPES, MAX_ROWS, dtype=bf16, device=cpu, arch=90)
    qkv, output, gate_up, down, head = (matrix(shape, is_fp8) for shape in SHAPES)
    stream = ResidualRows.allocate(MAX_ROWS + first, 3072, bf16, cpu, product)
    gain, table = torch.empty(3072, dtype=bf16), torch.empty(8208, 3072, dtype=bf16)
    frames = torch.zeros(MAX_ROWS + 1, 8, dtype=torch.int64)
    for count in counts:
        span = slice(first, first + count)
        rows = ResidualRows(
            stream.hidden[span], stream.scaled[span], stream.square_sums[:, span]
        )
        if not first:
            embed_frames(frames, torch.zeros(count, dtype=torch.int64), table, gain, rows, space)
        normed_linear(rows, 1e-5, qkv, torch.empty(count, 5120, dtype=bf16), space)
        residual_linear(torch.empty(count, 3072, dtype=bf16), output, gain, rows, space)
        gated = torch.empty(count, 8192, dtype=product)
        gated_linear(rows, 1e-5, gate_up, gated, space)
        residual_linear(gated, down, gain, rows, space)
        normed_linear(rows, 1e-5, head, torch.empty(count, 8208), space)


def attention(kept, counts):
    cache = torch.empty(2, 300, 8, 16, 128, dtype=kept)
    angles = torch.empty(2048, 1, 128, dtype=bf16)
    tables = torch.zeros(MAX_ROWS + 1, 128, dtype=torch.int64)
    arrivals = torch.zeros(MAX_ROWS * 8, dtype=torch.int32)
    for count in counts:
        qkv = torch.empty(count, 5120, dtype=bf16)
        # Where a step's indices begin in memory that it shares with others is anywhere.
        index = torch.zeros(count + 1, dtype=torch.int64)[1:]
        tiles = torch.zeros(3, 4, dtype=torch.int32)
        for longest in (100, 1024, 2048):
            decode_attention.rope_write_attend(
                qkv, angles, angles, cache, tables, index, index, 24, 0.1,
                max_context_len=longest, arrivals=arrivals,
            )
        prefill_attention.rope_attend(
            qkv, angles, angles, cache, tables[:, :count], index, tiles, 24, 0.1
        )
        rope_write_kv.rope_write_kv(qkv, angles, angles, cache, index, index, 24)


def sampler(counts):
    state = CodebookState(DelayPattern(8, 1024, 1025), MAX_ROWS + 1)
    draw = DeviceSampler(state.memory, torch.zeros(MAX_ROWS + 1, dtype=torch.int64))
    for count in counts:
        results = torch.zeros(count, 9, dtype=torch.int16)
        draw(torch.empty(count, 8, 1026), torch.zeros(count, dtype=torch.int64), results)


def windows(counts):
    for count in counts:
        decode_windows(torch.zeros(count % 5 + 1, 8, count, dtype=torch.int64))


with torch.device("meta"):
    codec = HiggsCodec(HiggsCodecConfig(decode_only=True))
codec.to_empty(device=cpu)
layers = list(codec.acoustic_decoder.layers())
decode_windows = PairWaveDecoder(codec.table, codec.table_bias, 8, layers, arch=90)


def everything(counts):
    for is_fp8 in (False, True):
        products(is_fp8, counts)
        attention(torch.float8_e4m3fn if is_fp8 else bf16, counts)
    sampler(counts)
    windows([count % 50 + 1 for count in counts])


everything(batch_buckets(MAX_ROWS))
recorded = dict(built)
everything((3, 5, 13, 31, 47, 63, 100, 129, 255))
others = {name: built[name] - count for name, count in recorded.items()}
products(False, (4,), first=9)  # as audio rows behind text rows
shifted = {name: built[name] - count - others[name] for name, count in recorded.items()}
print(json.dumps({"recorded": recorded, "others": others, "shifted": shifted}))
"""


@pytest.fixture(scope="module")
def built(repo_root: Path) -> dict[str, dict[str, int]]:
    """Kernel -> variants for recorded steps; further ones for others, and for rows behind others."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=repo_root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_card_takes_every_launch(built: dict[str, dict[str, int]]) -> None:
    assert set(built["recorded"]) == {
        *("embed_frames_kernel", "linear_kernel", "residual_linear_kernel", "gated_linear_kernel"),
        *("decode_attention_kernel", "prefill_attention_kernel", "rope_write_kv_kernel"),
        *("sample_frames_kernel", "sum_codes_kernel", "convolve_kernel", "samples_kernel"),
    }


def test_what_is_built_for_recorded_steps_serves_all_others(
    built: dict[str, dict[str, int]],
) -> None:
    """Building one takes seconds, and none can be built while a step is recorded."""
    assert not any(built["others"].values()), built["others"]
    assert not any(built["shifted"].values()), built["shifted"]


def test_kernels_are_told_apart_by_nothing_but_their_sizes(
    built: dict[str, dict[str, int]],
) -> None:
    recorded = built["recorded"]
    # One for each type that a cache can have; where a step ends counts nowhere.
    assert recorded["decode_attention_kernel"] == 2
    assert recorded["prefill_attention_kernel"] == 2
    assert recorded["rope_write_kv_kernel"] == 2
    assert recorded["sample_frames_kernel"] == 1
    assert recorded["embed_frames_kernel"] == 2
    # Per type of weights: gates per bucket of rows, others per shape too.
    assert recorded["gated_linear_kernel"] <= 2 * 5
    assert recorded["linear_kernel"] <= 2 * 2 * 5
    assert recorded["residual_linear_kernel"] <= 2 * 2 * 5
    # The first one, and of each width upsampling, dilated, and residual with more to come or none.
    assert recorded["convolve_kernel"] == 1 + 5 * 4
    assert recorded["sum_codes_kernel"] == recorded["samples_kernel"] == 1
