"""Steps of few launches, decode and prefill, compute what the model's layers do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from vllm.checkpoints.make_model import _template
from vllm.forward_context import set_forward_context
from vllm.kernels import fused_step, native
from vllm.kernels.attention import (
    DecodeMetadata,
    PrefillMetadata,
    PrefillSequence,
    _plan_fused,
)
from vllm.kernels.cache import allocate_kv_caches
from vllm.kernels.dependent_launch import DependentLaunch
from vllm.kernels.fused_step import FusedRows, FusedStep
from vllm.kernels.quantize import WeightFormat
from vllm.kernels.skinny_linear import LinearWorkspace
from vllm.model_executor.models.higgs_audio import HiggsAudioModel

BLOCK_SIZE, NUM_BLOCKS, NUM_ROWS = 16, 24, 4  # the last row and block are spare
MAX_LEN = 80


@dataclass(eq=False)
class Case:
    model: HiggsAudioModel
    frames: Tensor
    tables: Tensor
    caches: list[Tensor]

    def fused(self) -> FusedStep:
        rows = FusedRows(self.frames, self.caches, self.tables)
        return FusedStep(self.model.fused_weights(), rows, max_batch=NUM_ROWS)

    def by_layers(self, rows: Tensor, positions: Tensor) -> Tensor:
        metadata = DecodeMetadata.build(self.tables[rows], (positions + 1).tolist(), BLOCK_SIZE)
        with set_forward_context(metadata, self.caches):
            hidden = self.model(self.model.embed_codes(self.frames[rows]), positions, 0)
        return self.model.audio_logits(hidden).flatten(1)


@pytest.fixture
def case() -> Case:
    with native.disabled(), torch.inference_mode():
        torch.manual_seed(0)
        model = HiggsAudioModel(_template("tiny"), dtype=torch.float32, max_model_len=MAX_LEN)
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05)
        spec = model.spec
        caches = allocate_kv_caches(
            spec.num_layers,
            NUM_BLOCKS,
            BLOCK_SIZE,
            spec.num_kv_heads,
            spec.head_dim,
            dtype=torch.float32,
        )
        for cache in caches:
            cache.normal_()
        frames = torch.randint(spec.codebook_size, (NUM_ROWS, spec.num_codebooks))
        tables = torch.randperm(NUM_BLOCKS - 1)[: NUM_ROWS * 5].view(NUM_ROWS, 5)
        tables[-1] = NUM_BLOCKS - 1
        yield Case(model, frames, tables, caches)


def test_logits_and_pages_are_those_of_the_layers(case: Case) -> None:
    rows, positions = torch.tensor([2, 0, 1]), torch.tensor([17, 0, 79])
    before = [cache.clone() for cache in case.caches]
    expected = case.by_layers(rows, positions)
    pages = [cache.clone() for cache in case.caches]
    for cache, content in zip(case.caches, before, strict=True):
        cache.copy_(content)
    logits = case.fused()(rows, positions, MAX_LEN)
    torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-5)
    for cache, page in zip(case.caches, pages, strict=True):
        torch.testing.assert_close(cache, page, rtol=2e-4, atol=2e-5)
    assert not torch.equal(case.caches[0], before[0])


def test_fp8_weights_are_those_of_the_layers(case: Case) -> None:
    case.model.pack(WeightFormat.FP8)
    rows, positions = torch.tensor([2, 0, 1]), torch.tensor([17, 0, 79])
    expected = case.by_layers(rows, positions)
    logits = case.fused()(rows, positions, MAX_LEN)
    torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-5)


def test_idle_rows_write_nothing(case: Case) -> None:
    before = [cache.clone() for cache in case.caches]
    step = case.fused()
    step(torch.tensor([1, 3]), torch.tensor([-1, -1]), MAX_LEN)
    for cache, content in zip(case.caches, before, strict=True):
        assert torch.equal(cache, content)


def test_idle_rows_do_not_disturb_others(case: Case) -> None:
    step = case.fused()
    alone = step(torch.tensor([2, 2]), torch.tensor([30, 30]), MAX_LEN)[:1].clone()
    beside = step(torch.tensor([2, 3]), torch.tensor([30, -1]), MAX_LEN)[:1]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_text_rows", [0, 13, 30])
def test_prefill_fills_the_pages_that_the_layers_fill(case: Case, num_text_rows: int) -> None:
    """Two sequences, one of them from its 5th position on, whose rows are sorted by kind."""
    order = torch.randperm(30)
    sequences = [
        PrefillSequence(order[:20], case.tables[0], start=0, length=20),
        PrefillSequence(order[20:], case.tables[1], start=4, length=10),
    ]
    metadata = PrefillMetadata.build(sequences, BLOCK_SIZE)
    positions = torch.empty(30, dtype=torch.int64)
    for each in sequences:
        positions[each.rows] = torch.arange(each.start, each.start + each.length)
    hidden = torch.randn(30, case.model.spec.hidden_size)
    before = [cache.clone() for cache in case.caches]
    with set_forward_context(metadata, case.caches):
        case.model.fill_cache(hidden, positions, num_text_rows)
    expected = [cache.clone() for cache in case.caches]
    for cache, content in zip(case.caches, before, strict=True):
        cache.copy_(content)
    prefill = case.model.fused_prefill(max_rows=32)
    prefill(hidden, (num_text_rows, 30 - num_text_rows), _plan_fused(metadata), case.caches)
    for cache, pages, content in zip(case.caches, expected, before, strict=True):
        torch.testing.assert_close(cache, pages, rtol=2e-4, atol=2e-5)
        assert not torch.equal(cache, content)


def test_all_launches_of_a_step_are_dependent_or_none(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: dict[str, list[object]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *args, pdl, **options: launched.setdefault(name, []).append(pdl)

    def attend(qkv: Tensor, *args: object, pdl: bool, **options: object) -> Tensor:
        launched.setdefault("attention", []).append(pdl)
        return qkv[:, : case.model.spec.hidden_size].contiguous()

    for name in ("linear", "gated_linear", "residual_linear"):
        monkeypatch.setattr(f"vllm.kernels.triton.skinny_linear.{name}", note(name))
    monkeypatch.setattr("vllm.kernels.triton.embed_frames.embed_frames", note("embed"))
    monkeypatch.setattr(fused_step, "rope_write_attend", attend)
    monkeypatch.setattr(fused_step, "LinearWorkspace", partial(LinearWorkspace, arch=90))
    rows = FusedRows(case.frames, case.caches, case.tables)
    step = FusedStep(
        case.model.fused_weights(), rows, max_batch=NUM_ROWS, pdl=DependentLaunch.PREFETCH
    )

    step(torch.tensor([0, 2]), torch.tensor([5, 9]), MAX_LEN)

    num_layers = case.model.spec.num_layers
    assert launched == {
        "embed": [True],
        "linear": [DependentLaunch.PREFETCH] * (num_layers + 1),
        "attention": [True] * num_layers,
        "residual_linear": [DependentLaunch.PREFETCH] * 2 * num_layers,
        "gated_linear": [DependentLaunch.PREFETCH] * num_layers,
    }
