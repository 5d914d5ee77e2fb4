"""Codec decode, native, by torch and by transformers, at once and streamed, in one interleaved run.

Where the native library is missing, ours is torch under both names. Runs on random checkpoints of
the published sizes, since the time does not depend on the weights. The peer is transformers' own
model class on the same files. ``--rounding`` and ``--count`` take no times: they tell what rounded
products would cost the samples, and how many products there are.

    python -m benchmarks.codec_decode
    python -m benchmarks.codec_decode --sizes full --num-frames 250 --json out.json
    python -m benchmarks.codec_decode --num-threads 1 --clock thread
    python -m benchmarks.codec_decode --rounding --sizes full embedded --num-frames 50
    python -m benchmarks.codec_decode --count --sizes full
"""

from __future__ import annotations

import argparse
import importlib.machinery
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks._codec_rounding import measure_rounding
from benchmarks._codec_work import format_counts, windows_of
from benchmarks._report import format_table, write_json
from benchmarks._timing import CLOCKS, interleave, ratio
from vllm.checkpoints.make_codec import CODEC_SIZES, make_codec
from vllm.kernels import native
from vllm.model_executor.codecs import Codec, load_codec
from vllm.model_executor.codecs.streaming import DEFAULT_RAMP, Window, WindowPlan

TOLERANCE = 1e-4
NATIVE_TOLERANCE = 1e-5  # between ours and the same network by torch


def measure(
    size: str,
    *,
    num_frames: int,
    num_rounds: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Times of one codec size.

    Raises:
        AssertionError: the rivals do not compute the same samples, so the times would mean nothing.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_codec(folder, layout="transformers", size=size, seed=0)
        codec = load_codec(folder, device=device)
        reference = load_reference(folder).to(device)
    generator = torch.Generator().manual_seed(0)
    shape = (1, codec.num_codebooks, num_frames)
    codes = torch.randint(codec.codebook_size, shape, generator=generator).to(device)
    windows = windows_of(WindowPlan(codec.context_frames, DEFAULT_RAMP), num_frames)

    rivals = {
        "one-shot": lambda: synchronized(codec.decode(codes)),
        "transformers": lambda: synchronized(reference.decode(codes).audio_values),
        "torch": lambda: synchronized(by_torch(codec.decode, codes)),
        "streamed": lambda: synchronized(decode_streamed(codec, codes, windows)),
        "torch streamed": lambda: synchronized(by_torch(decode_streamed, codec, codes, windows)),
        "first chunk": lambda: synchronized(decode_window(codec, codes, windows[0])),
    }
    with torch.inference_mode():
        ours, theirs = codec.decode(codes), reference.decode(codes).audio_values
        streamed = decode_streamed(codec, codes, windows)
        assert (ours - theirs.reshape(ours.shape)).abs().max() < TOLERANCE
        assert (ours - streamed).abs().max() < NATIVE_TOLERANCE
        assert (ours - by_torch(codec.decode, codes)).abs().max() < NATIVE_TOLERANCE
        title = f"codec {size}"
        seconds = interleave(rivals, num_rounds=num_rounds, title=title, clock=clock)
    audio_s = num_frames / codec.frame_rate
    return {
        "size": size,
        "num_frames": num_frames,
        "audio_s": audio_s,
        "device": device,
        "num_threads": torch.get_num_threads(),
        "seconds": {name: median(values) for name, values in seconds.items()},
        "times_real_time": {
            name: audio_s / median(values)
            for name, values in seconds.items()
            if name != "first chunk"
        },
        "isa": native.isa(),
        "speed_over_torch": ratio(seconds["torch"], seconds["one-shot"]),
        "streamed_speed_over_torch": ratio(seconds["torch streamed"], seconds["streamed"]),
        "speed_over_transformers": ratio(seconds["transformers"], seconds["one-shot"]),
        "streamed_over_one_shot_time": ratio(seconds["streamed"], seconds["one-shot"]),
    }


def load_reference(folder: Path) -> Any:
    """transformers' codec. Its module imports torchaudio, which decoding never calls."""
    if "torchaudio" not in sys.modules:
        stand_in = types.ModuleType("torchaudio")
        stand_in.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        stand_in.__dict__["__version__"] = "0"
        sys.modules["torchaudio"] = stand_in
    from transformers.models.higgs_audio_v2_tokenizer import modeling_higgs_audio_v2_tokenizer
    from transformers.utils import import_utils

    message = import_utils.BACKENDS_MAPPING["torchaudio"][1]
    import_utils.BACKENDS_MAPPING["torchaudio"] = (lambda: True, message)
    model_class = modeling_higgs_audio_v2_tokenizer.HiggsAudioV2TokenizerModel
    model: Any = model_class.from_pretrained(folder)
    return model.eval()


def decode_streamed(codec: Codec, codes: Tensor, windows: Sequence[Window]) -> Tensor:
    """Samples [1, num_frames * hop] of all windows, one after another."""
    return torch.cat([decode_window(codec, codes, window) for window in windows], dim=1)


def decode_window(codec: Codec, codes: Tensor, window: Window) -> Tensor:
    """New samples of one window, [1, num_emitted * hop]."""
    first = window.emit_start - window.start
    return codec.decode_part(
        codes[:, :, window.start : window.stop], first, first + window.num_emitted
    )


def by_torch(decode: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Samples of a decode without the native library."""
    with native.disabled():
        return decode(*arguments)


def synchronized(samples: Tensor) -> Tensor:
    """Wait until the device has made them."""
    if samples.is_cuda:
        torch.cuda.synchronize(samples.device)
    return samples


def print_results(results: Sequence[dict[str, Any]]) -> None:
    rivals = ("one-shot", "torch", "transformers", "streamed")
    header = ["codec", "audio s", *(f"{name} x real time" for name in rivals)]
    header += ["ours / torch", "streamed / torch streamed", "ours / transformers"]
    header += ["streamed / one-shot time", "first chunk ms"]
    rows = []
    for result in results:
        row: list[object] = [result["size"], result["audio_s"]]
        row += [result["times_real_time"][name] for name in rivals]
        row += [result["speed_over_torch"], result["streamed_speed_over_torch"]]
        row += [result["speed_over_transformers"], result["streamed_over_one_shot_time"]]
        row.append(1000 * result["seconds"]["first chunk"])
        rows.append(row)
    print(format_table(header, rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--sizes", nargs="+", choices=(*CODEC_SIZES, "embedded"), default=["full", "tiny"]
    )
    parser.add_argument("--num-frames", type=int, default=125, help="25 make a second")
    parser.add_argument("--num-rounds", type=int, default=5)
    parser.add_argument("--num-threads", type=int, help="default: torch's choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="thread: CPU time of one thread, for a machine that others use too",
    )
    parser.add_argument(
        "--rounding", action="store_true", help="measure the noise of rounded products instead"
    )
    parser.add_argument(
        "--count",
        action="store_true",
        help="count the multiply-adds of windows, whole and in part, instead",
    )
    parser.add_argument(
        "--arch", type=int, default=90, help="with --count: compute capability of the tiles"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    if "embedded" in arguments.sizes and not arguments.rounding:
        parser.error("--sizes embedded: only with --rounding, since the peer does not load it")
    if arguments.count:
        for size in arguments.sizes:
            print(format_counts(size, num_frames=arguments.num_frames, arch=arguments.arch))
        return 0
    if arguments.rounding:
        for size in arguments.sizes:
            ratios = measure_rounding(size, num_frames=arguments.num_frames)
            print(format_table([f"{size}, SNR dB", *ratios], [["", *ratios.values()]]))
        return 0
    results = [
        measure(
            size,
            num_frames=arguments.num_frames,
            num_rounds=arguments.num_rounds,
            device=arguments.device,
            clock=CLOCKS[arguments.clock],
        )
        for size in arguments.sizes
    ]
    print_results(results)
    if arguments.json:
        write_json(arguments.json, {"results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
