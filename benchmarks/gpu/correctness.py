"""Section ``correctness``: kernels against float64, rows against their company, runs against each other."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from benchmarks.gpu import kernel_cases, linear_cases
from benchmarks.gpu.kernel_cases import Case, SamplerRows
from benchmarks.gpu.random_engine import drawn_weights
from benchmarks.gpu.suite import Suite
from vllm.checkpoints.divergence import measure_divergence
from vllm.exceptions import HiggsAudioError
from vllm.model_executor.models import SpeechModel, load_model
from vllm.sampling_params import SamplingParams

__all__ = ["run"]

_MAX_LOGIT_ERROR = 3e-2  # of bfloat16 weights and sums against float32
_MIN_AGREEMENT = 0.999  # of draws with torch's from the same noise
_MAX_DISTANCE = 0.02  # of the drawn distribution from the exact one


def run(suite: Suite) -> None:
    """Errors, bit equality and repeatability of each kernel, then of the sampler and the model."""
    rows = max(suite.scale.invariant_rows)
    context = suite.scale.contexts[-1]
    for case in suite.in_time(_cases(suite, rows, context)):
        with suite.attempt(f"{case.kernel} {case.shape}"):
            _against_float64(suite, case)
            _rows_alone(suite, case)
            _repeated(suite, case)
    if suite.uses_triton:
        with suite.attempt("sampler"):
            _sampler(suite)
    with suite.attempt("model"):
        _model(suite)


def _cases(suite: Suite, rows: int, context: int) -> Iterator[Case]:
    yield from linear_cases.linear_cases(suite, rows, is_cold=False)
    yield from linear_cases.linear_cases(suite, rows, is_cold=False, is_fp8=True)
    yield linear_cases.embed_case(suite, rows)
    yield kernel_cases.attention_case(suite, min(rows, 64), context, is_cold=False)


def _against_float64(suite: Suite, case: Case) -> None:
    exact = case.exact()
    error = (case.first_rows(case.num_rows).double() - exact).norm() / exact.norm()
    suite.check(f"{case.kernel} {case.shape} against float64", error.item(), case.limit)


def _rows_alone(suite: Suite, case: Case) -> None:
    """Bits of the first rows when no others are there."""
    whole = case.first_rows(case.num_rows)
    counts = [count for count in suite.scale.invariant_rows if count <= case.num_rows]
    differing = [
        count for count in counts if not torch.equal(case.first_rows(count), whole[:count])
    ]
    # Elsewhere torch computes these, which promises nothing of the kind.
    limit = 0 if suite.is_cuda else math.inf
    suite.check(f"{case.kernel}: row counts of {counts} with other bits", len(differing), limit)


def _repeated(suite: Suite, case: Case) -> None:
    """The same again and again: kernels whose programs meet must not depend on who is first."""
    first = case.first_rows(case.num_rows)
    count = 200 if suite.is_cuda else 2
    repeats = (case.first_rows(case.num_rows) for _ in range(count))
    differing = sum(not torch.equal(each, first) for each in repeats)
    suite.check(f"{case.kernel}: of {count} repeats with other bits", differing, 0)


def _sampler(suite: Suite) -> None:
    """Draws against torch's from the same noise, and against the distribution itself."""
    num_rows = 256 if suite.is_cuda else 2
    streams = SamplerRows(suite, num_rows)
    before = streams.save()
    ours, theirs = streams.draw().long(), streams.torch_draw()
    agreement = (ours == theirs).double().mean().item()
    name = "sampler: draws equal to torch's, same noise"
    suite.add(
        name, agreement, "", note=f"at least {_MIN_AGREEMENT}", is_wrong=agreement < _MIN_AGREEMENT
    )
    for count in sorted({1, num_rows // 2}):
        streams.restore(before)
        differing = int((streams.draw(count).long() != ours[:count]).sum())
        suite.check(f"sampler: codes of {count} rows that differ alone", differing, 0)
    if suite.is_cuda:
        _sampled_distribution(suite, num_rows)


def _sampled_distribution(suite: Suite, num_rows: int) -> None:
    """Total variation of many draws from what softmax, top-k and top-p allow; RAS plays no part."""
    streams = SamplerRows(suite, num_rows, SamplingParams(ras_window_length=0))
    streams.logits.copy_(streams.logits[:1].expand_as(streams.logits).clone())
    # A stream that could end would end: -1 is no place to count at, and a card is lost by it.
    streams.logits[..., [suite.config.stream_bos_id, suite.config.stream_eos_id]] = -torch.inf
    counts = torch.zeros(streams.num_codebooks, streams.size, device=suite.device)
    num_draws = 400
    one = torch.ones(num_rows, streams.num_codebooks, device=suite.device)
    for _ in range(num_draws):
        frames = streams.draw().long()
        counts.scatter_add_(1, frames.t().contiguous(), one.t().contiguous())
    probs = streams.logits[0].double().softmax(-1)
    ranked, order = probs.sort(-1, descending=True)
    ranked[:, 50:] = 0
    before = ranked.cumsum(-1) - ranked
    ranked[before >= 0.95 * ranked.sum(-1, keepdim=True)] = 0
    wanted = torch.zeros_like(probs).scatter_(1, order, ranked)
    wanted /= wanted.sum(-1, keepdim=True)
    drawn = counts.double() / counts.sum(-1, keepdim=True)
    distance = 0.5 * (drawn - wanted).abs().sum(-1)
    name = f"sampler: total variation of {num_draws * num_rows:,} draws, largest codebook"
    suite.check(name, distance.max().item(), _MAX_DISTANCE)


def _model(suite: Suite) -> None:
    """Logits of all layers under teacher forcing: model's type against float32, and fp8."""
    num_frames = 8 if suite.is_cuda else 2
    ids = torch.randint(100, 190, (40,), device=suite.device)
    ours = _load(suite, str(suite.scale.dtype).removeprefix("torch."))
    divergence = measure_divergence(_load(suite, "float32"), ours, ids, num_frames=num_frames)
    name = f"logits, {suite.config.num_hidden_layers} layers, against float32"
    suite.check(name, divergence.logit_error, _MAX_LOGIT_ERROR)
    suite.add("codes from the same noise as float32", 100 * divergence.sample_agreement, "%")
    if not suite.is_cuda:
        suite.note("no fp8 weights on a CPU")
        return
    try:
        rounded = _load(suite, "auto", quantization="fp8")
    except HiggsAudioError as error:
        suite.note(f"no fp8 weights: {error}")
        return
    divergence = measure_divergence(ours, rounded, ids, num_frames=num_frames)
    suite.add("logits of fp8 against the model's type", divergence.logit_error, "")
    suite.add("codes of fp8 from the same noise", 100 * divergence.sample_agreement, "%")
    suite.note(f"fp8: {divergence.text()}")


def _load(suite: Suite, dtype: str, quantization: str | None = None) -> SpeechModel:
    with drawn_weights(suite):
        return load_model(
            suite.folder / "lm",
            device=suite.device,
            dtype=dtype,
            max_model_len=suite.scale.max_model_len,
            quantization=quantization,
        )
