"""Recorded prefill steps write what the same positions write one operation after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm.checkpoints.make_model import _template
from vllm.kernels import attention
from vllm.kernels.cache import allocate_kv_caches
from vllm.model_executor.models import higgs_audio
from vllm.model_executor.models.higgs_audio import HiggsAudioModel
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched_output import NewRequestData
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.cuda_graphs import NoGraphs
from vllm.v1.worker.decoder import RowOwners
from vllm.v1.worker.device_prefill import PrefillSize, PrefillSizes, RecordedPrefill
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.model_state import CodebookModelState
from vllm.v1.worker.prefill import EagerPrefill, PromptSlice

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS, MAX_NUM_SEQS = 16, 24, 20  # and one spare of blocks and of rows


class Recorder(NoGraphs):
    """Calls steps as they are, first in ``warm_up`` as CUDA graphs do, and counts replays."""

    def __init__(self) -> None:
        self.num_replays = 0

    def warm_up(self, run: Callable[[], None]) -> None:
        run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.num_replays += 1
            run()

        return replay


@dataclass(frozen=True, eq=False)
class Case:
    owners: RowOwners
    recorder: Recorder
    recorded: RecordedPrefill
    eager: EagerPrefill

    def written_by(
        self, run: Callable[[list[PromptSlice]], None], *steps: list[PromptSlice]
    ) -> list[Tensor]:
        """Keys and values of the blocks that somebody owns."""
        for cache in self.owners.kv_caches:
            cache.zero_()
        for slices in steps:
            run(slices)
        return [cache[:, :NUM_BLOCKS].clone() for cache in self.owners.kv_caches]


@pytest.fixture(scope="module")
def model() -> HiggsAudioModel:
    with torch.inference_mode():
        torch.manual_seed(0)
        model = HiggsAudioModel(
            replace(_template("tiny"), num_hidden_layers=3, vocab_size=96),
            dtype=torch.float32,
            max_model_len=256,
        )
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05)
    return model


@pytest.fixture
def case(model: HiggsAudioModel) -> Case:
    spec = model.spec
    table = BlockTable(MAX_NUM_SEQS + 1, 16, CPU, is_mirrored=True)
    owners = RowOwners(
        model=model,
        state=CodebookModelState(model, MAX_NUM_SEQS + 1, CPU),
        kv_caches=allocate_kv_caches(
            spec.num_layers,
            NUM_BLOCKS + 1,
            BLOCK_SIZE,
            spec.num_kv_heads,
            spec.head_dim,
            dtype=spec.dtype,
            device=CPU,
        ),
        block_size=BLOCK_SIZE,
        block_table=table,
        batch=InputBatch(MAX_NUM_SEQS, spec.codebook_size, CPU),
        positions=np.zeros(MAX_NUM_SEQS, np.int64),
    )
    for row in range(MAX_NUM_SEQS):
        table.append(row, [row] if row > 3 else [row, 23 - row])
    table.append(owners.spare_row, [owners.spare_block])
    recorder, eager = Recorder(), EagerPrefill(owners, CPU)
    recorded = RecordedPrefill(owners, eager, device=CPU, graphs=recorder, max_num_tokens=100)
    return Case(owners, recorder, recorded, eager)


def prompt(row: int, start: int, stop: int, audio: range = range(0)) -> PromptSlice:
    rng = np.random.default_rng(row)
    data = NewRequestData(
        request_id=str(row),
        prompt_token_ids=rng.integers(3, 90, 64).astype(np.int32),
        prompt_frames=rng.integers(0, 1024, (len(audio), 8)).astype(np.int16),
        audio_positions=np.array(audio, np.int64),
        sampling_params=SamplingParams(),
        seed=1,
        frame_limit=40,
        max_silence_frames=None,
        num_cached_positions=0,
    )
    return PromptSlice(data, row, start, stop)


STEPS = (
    [prompt(0, 0, 20, range(4, 15)), prompt(1, 0, 31), prompt(2, 0, 1)],
    [prompt(0, 20, 27, range(4, 15)), prompt(3, 0, 12, range(12)), prompt(2, 1, 3, range(2, 3))],
)


@torch.inference_mode()
def test_recorded_steps_write_the_bits_of_eager_ones(case: Case) -> None:
    expected = case.written_by(case.eager.run, *STEPS)
    assert sum(cache.any(-1).sum() for cache in expected) > 0
    case.recorded.warm_up()
    written = case.written_by(case.recorded.run, *STEPS)
    assert case.recorder.num_replays == len(STEPS)
    for index, (cache, right) in enumerate(zip(written, expected, strict=True)):
        assert torch.equal(cache, right), f"layer {index}"


@torch.inference_mode()
def test_recorded_steps_of_the_kernels_write_what_eager_ones_do(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_is_fused", lambda cache: True)
    monkeypatch.setattr(higgs_audio, "can_fuse", lambda device, **sizes: True)
    expected = case.written_by(case.eager.run, *STEPS)
    case.recorded.warm_up()
    written = case.written_by(case.recorded.run, *STEPS)
    assert case.recorder.num_replays == len(STEPS)
    # Torch stands in for the kernels, and its products of other numbers of rows differ in rounding.
    torch.testing.assert_close(written, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_what_no_size_holds_is_launched_as_it_is(case: Case) -> None:
    case.recorded.warm_up()
    many = [prompt(row, 0, 2) for row in range(18)]  # as many tiles, and 1 + 16 are recorded
    assert any(cache.any() for cache in case.written_by(case.recorded.run, many))
    assert case.recorder.num_replays == 0
    case.recorded.run(many[:17])
    assert case.recorder.num_replays == 1


@given(max_num_tokens=st.integers(16, 4096))
def test_sizes_are_of_both_kinds_and_the_largest_come_first(max_num_tokens: int) -> None:
    sizes = PrefillSizes(max_num_tokens).all
    rows = [size.num_rows for size in sizes]
    assert rows == sorted(rows, reverse=True)
    assert len(set(sizes)) == len(sizes)
    assert all(0 < count <= 768 for count in rows)
    largest = min(max_num_tokens, 768)
    assert {PrefillSize(largest, 0), PrefillSize(0, largest)} <= set(sizes)


@given(text=st.integers(1, 900), audio=st.integers(0, 900))
def test_a_step_takes_the_smallest_size_that_holds_it(text: int, audio: int) -> None:
    sizes = PrefillSizes(1024)
    size = sizes.size_for(text, audio, 1)
    if size is None:
        # Each kind is filled up by a half at most, or to 64.
        assert max(64, 2 * text) + max(64, 2 * audio) > 768
        return
    holding = [s for s in sizes.all if s.num_text >= text and s.num_audio >= audio]
    assert size == min(holding, key=lambda s: s.num_rows)


def test_more_tiles_than_a_size_has_are_too_many() -> None:
    sizes = PrefillSizes(1024)
    assert sizes.size_for(60, 300, 23) == PrefillSize(64, 384)
    assert PrefillSize(64, 384).num_tiles == 23
    assert sizes.size_for(60, 300, 24) is None
