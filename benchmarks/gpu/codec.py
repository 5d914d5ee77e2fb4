"""Section ``codec``: windows of frames to samples, in each type, beside what the layers cost.

Pairs of bfloat16 in kernels of our own are how the engine decodes, and only what new samples depend
on. The others are cuDNN's, of whole windows: float32, which ``--codec-kernels torch`` takes, TF32 if
it were let, and float16.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from benchmarks._codec_work import codec_without_values, multiply_adds, whole_window
from benchmarks.gpu.clock import seconds_per_call
from benchmarks.gpu.floors import Work
from benchmarks.gpu.suite import Suite
from vllm.kernels import native
from vllm.model_executor.codecs import load_codec
from vllm.model_executor.codecs.interface import Codec
from vllm.model_executor.codecs.streaming import DEFAULT_RAMP, WindowPlan, WindowShape

__all__ = ["load_pairs", "operations_per_audio_s", "predicted", "run"]

_WANTED_SNR_DB = 60.0
_PRODUCTS = {"pairs": 3}  # on tensor cores for each multiply-add, where it is not one


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
    for name, batch in suite.in_time(itertools.product(codecs, suite.scale.codec_batches)):
        with suite.attempt(f"{name}, batch {batch}"), _convolutions(name):
            for shape in _timed_shapes(exact.context_frames):
                _window(suite, name, codecs[name], batch, shape)


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


def _timed_shapes(context_frames: int) -> tuple[WindowShape, WindowShape]:
    """Of a stream's first window and of those in its middle."""
    shapes = WindowPlan(context_frames, DEFAULT_RAMP).usual_shapes
    return shapes[0], max(shape for shape in shapes if shape.last < shape.num_frames)


def _window(suite: Suite, name: str, codec: Codec, batch: int, shape: WindowShape) -> None:
    """Time of what the engine asks for; where kernels take parts, that of whole windows too."""
    title = f"codec {name}, {batch} windows of {shape.num_frames} frames"
    num_new = shape.last - shape.first
    audio_s = batch * num_new / codec.frame_rate
    whole = whole_window(shape.num_frames)
    takes_parts = name == "pairs" or (native.loaded_library() is not None and not suite.is_cuda)
    seconds, work = _timed(suite, name, codec, batch, shape if takes_parts else whole)
    note = f"{num_new} of them new, {audio_s / seconds:,.0f} times real time"
    suite.add(title, seconds * 1e3, "ms", work=work, note=note)
    if takes_parts:
        seconds_of_all, work_of_all = _timed(suite, name, codec, batch, whole)
        share = work.operations / work_of_all.operations
        note = f"what is new takes {seconds / seconds_of_all:.3f} of that, {share:.3f} of the work"
        suite.add(f"{title}, whole", seconds_of_all * 1e3, "ms", work=work_of_all, note=note)


def _timed(
    suite: Suite, name: str, codec: Codec, batch: int, shape: WindowShape
) -> tuple[float, Work]:
    """Seconds of a batch, and what was computed meanwhile."""
    codes = _codes(suite, batch, shape.num_frames)

    def decode() -> object:
        return codec.decode_part(codes, shape.first, shape.last)

    with torch.inference_mode():
        seconds = seconds_per_call([decode], suite.device, num_rounds=suite.scale.num_rounds)
    weights = sum(each.numel() * each.element_size() for each in codec.parameters())
    return seconds, Work(weights, batch * _PRODUCTS.get(name, 1) * _operations(suite, shape))


def operations_per_audio_s(suite: Suite) -> float:
    """Of a second of audio, without context, and one product for each multiply-add."""
    num_frames = round(codec_without_values(suite.scale.codec).frame_rate)
    return _operations(suite, whole_window(num_frames))


def _operations(suite: Suite, shape: WindowShape) -> float:
    return 2.0 * multiply_adds(codec_without_values(suite.scale.codec), shape)


def predicted(suite: Suite) -> list[list[object]]:
    """Floors of one window of each usual shape in pairs, whole and in part."""
    rows: list[list[object]] = []
    codec = codec_without_values(suite.scale.codec)
    for shape in WindowPlan(codec.context_frames, DEFAULT_RAMP).usual_shapes:
        whole, part = (
            _PRODUCTS["pairs"] * _operations(suite, each)
            for each in (whole_window(shape.num_frames), shape)
        )
        audio_s = (shape.last - shape.first) / codec.frame_rate
        name = f"{shape.num_frames} frames, {shape.first} to {shape.last}"
        microseconds = [1e6 * each / suite.ceilings.matmul_ops_s for each in (whole, part)]
        rows.append([name, whole / 1e9, part / 1e9, *microseconds, microseconds[1] / audio_s])
    return rows


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
            part = codec.decode_part(batch, context, context + num_new)[3]
        difference = (part.float() - whole.float()).abs().max().item()
        # Kernels of our own promise the same bits.
        is_wrong = name == "pairs" and difference > 0
        title = f"codec {name}, window against one decode"
        suite.add(title, difference, "", note="largest", is_wrong=is_wrong)


def _codes(suite: Suite, batch: int, num_frames: int) -> torch.Tensor:
    shape = (batch, suite.config.num_codebooks, num_frames)
    return torch.randint(suite.config.stream_bos_id, shape, device=suite.device)
