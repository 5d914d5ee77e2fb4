"""Section ``codec``: windows of frames to samples, in each type, beside what the layers cost.

Pairs of bfloat16 in kernels of our own are how the engine decodes. The others are cuDNN's: float32,
which ``--codec-kernels torch`` takes, TF32 if it were let, and float16.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.clock import seconds_per_call
from benchmarks.gpu.floors import Work
from benchmarks.gpu.suite import Suite
from vllm.model_executor.codecs import load_codec
from vllm.model_executor.codecs.interface import Codec
from vllm.model_executor.codecs.streaming import DEFAULT_RAMP

__all__ = ["load_pairs", "run"]

_WANTED_SNR_DB = 60.0


def run(suite: Suite) -> None:
    """Seconds of windows of the ramp by batch; how far fewer bits than float32's are off."""
    exact = _load(suite, uses_kernels=not suite.is_cuda)
    codecs = {"fp32": exact}
    if suite.is_cuda:
        with suite.attempt("pairs"):
            codecs["pairs"] = load_pairs(suite)
        codecs["tf32"] = exact
        codecs["fp16"] = _load(suite, uses_kernels=False).half()
        with suite.attempt("noise"):
            _signal_to_noise(suite, codecs)
            _windows_against_whole(suite, codecs)
    ramp = (DEFAULT_RAMP[0], DEFAULT_RAMP[-1])
    cases = itertools.product(codecs, suite.scale.codec_batches, ramp)
    for name, batch, num_new in suite.in_time(cases):
        with suite.attempt(f"{name}, batch {batch}"), _convolutions(name):
            _window(suite, name, codecs[name], batch, num_new)


def load_pairs(suite: Suite) -> Codec:
    """The codec with our own kernels, which Triton builds meanwhile."""
    codec = _load(suite, uses_kernels=True)
    assert codec._pair_decoder is not None, "torch stands in for the kernels"
    return codec


def _load(suite: Suite, *, uses_kernels: bool) -> Codec:
    return load_codec(suite.folder / "codec", device=suite.device, uses_kernels=uses_kernels)


@contextmanager
def _convolutions(name: str) -> Iterator[None]:
    """Let cuDNN round float32 to TF32 where that is what is measured."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _window(suite: Suite, name: str, codec: Codec, batch: int, num_new: int) -> None:
    context = codec.context_frames
    codes = _codes(suite, batch, num_new + 2 * context)

    def decode() -> object:
        return codec.decode_part(codes, context, context + num_new)

    with torch.inference_mode():
        seconds = seconds_per_call([decode], suite.device, num_rounds=suite.scale.num_rounds)
    audio_s = batch * num_new / codec.frame_rate
    # The floor counts the new frames alone: context is what exactness costs, not what audio does.
    operations = audio_s * operations_per_audio_s(suite)
    weights = sum(each.numel() * each.element_size() for each in codec.parameters())
    suite.add(
        f"codec {name}, {batch} x {num_new} frames",
        seconds * 1e3,
        "ms",
        work=Work(weights, operations),
        note=f"{audio_s / seconds:,.0f} times real time",
    )


def operations_per_audio_s(suite: Suite) -> float:
    """Operations of a second of audio, counted by torch without computing them."""
    if "codec_operations" not in suite.extras:
        codec = load_codec(suite.folder / "codec", device="cpu")
        num_frames = 2 * round(codec.frame_rate)
        codes = torch.zeros(1, codec.num_codebooks, num_frames, dtype=torch.int64, device="meta")
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            codec.to("meta").decode(codes)
        suite.extras["codec_operations"] = counter.get_total_flops() / 2
    return float(suite.extras["codec_operations"])


def _signal_to_noise(suite: Suite, codecs: dict[str, Codec]) -> None:
    codes = _codes(suite, 1, 100)
    samples = {}
    for name, codec in codecs.items():
        with torch.inference_mode(), _convolutions(name):
            samples[name] = codec.decode(codes).float()
    signal = samples.pop("fp32")
    for name, rounded in samples.items():
        error = (rounded - signal).square().mean()
        snr = 10 * torch.log10(signal.square().mean() / error).item()
        note = f"fit for use from {_WANTED_SNR_DB:g} on"
        # Only what the engine takes by itself has to be fit.
        is_wrong = name == "pairs" and not snr >= _WANTED_SNR_DB
        suite.add(f"codec {name} against fp32", snr, "dB", note=note, is_wrong=is_wrong)


def _windows_against_whole(suite: Suite, codecs: Mapping[str, Codec]) -> None:
    """How far samples of a window in a batch are from those of one decode, in each type."""
    num_new, context = DEFAULT_RAMP[-1], codecs["fp32"].context_frames
    codes = _codes(suite, 1, num_new + 4 * context)
    first, last = context, num_new + 3 * context
    for name, codec in codecs.items():
        hop = codec.hop_length
        with torch.inference_mode(), _convolutions(name):
            whole = codec.decode(codes)[0, 2 * context * hop :][: num_new * hop]
            batch = codes[..., first:last].expand(8, -1, -1).contiguous()
            part = codec.decode(batch)[3, context * hop :][: num_new * hop]
        difference = (part.float() - whole.float()).abs().max().item()
        suite.add(f"codec {name}, window against one decode", difference, "", note="largest")


def _codes(suite: Suite, batch: int, num_frames: int) -> torch.Tensor:
    shape = (batch, suite.config.num_codebooks, num_frames)
    return torch.randint(suite.config.stream_bos_id, shape, device=suite.device)
