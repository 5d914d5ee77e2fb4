"""Section ``engine``: everything together, in process: prefill, steps, codec, scheduling."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.gpu import floors
from benchmarks.gpu.codec import operations_per_audio_s
from benchmarks.gpu.random_engine import FP8_OPTIONS, make_request, open_core
from benchmarks.gpu.suite import Suite
from benchmarks.gpu.traffic import Traffic, drive, percentile
from vllm.exceptions import ConfigError
from vllm.model_executor.codecs import load_codec
from vllm.model_executor.codecs.streaming import DEFAULT_RAMP
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.messages import EngineCoreRequest
from vllm.v1.worker import worker as worker_module

__all__ = ["run"]

_SMALL_CARD_BYTES = 24_000_000_000
_SMALL_CARD_POSITIONS = 1050


def run(suite: Suite) -> None:
    """Throughput by streams, first audio with a voice in the cache, exactness, a small card."""
    scale = suite.scale
    middle = scale.engine_streams[len(scale.engine_streams) // 2]
    with suite.attempt("engine"):
        _whole_engine(suite, middle)
    if suite.is_cuda:
        for ablation, rounds in (("cudnn", False), ("tf32", True)):
            if ablation in suite.ablations:
                with suite.attempt(f"convolutions by cuDNN, {ablation}"):
                    _with_library_convolutions(suite, middle, rounds=rounds)
        with suite.attempt("small card"):
            _small_card(suite, "", {}, scale.dtype.itemsize)
        if "fp8" in suite.ablations:
            with suite.attempt("small card, fp8"):
                _small_card(suite, " fp8", FP8_OPTIONS, 1)


def _whole_engine(suite: Suite, middle: int) -> None:
    scale = suite.scale
    with open_core(
        suite, decodes_audio=True, max_num_seqs=max(scale.engine_streams), **_memory(suite)
    ) as core:
        with suite.attempt("streams against one decode"):
            _stream_is_exact(suite, core)
        for streams in suite.in_time(scale.engine_streams):
            _cached_voice(suite, core, streams)
        for streams in suite.in_time(scale.engine_streams):
            _throughput(suite, core, streams, scale.short)
        for lengths in suite.in_time([scale.long]):
            _throughput(suite, core, middle, lengths)


def _memory(suite: Suite) -> dict[str, Any]:
    """On a CPU a small cache; on a card what the engine takes by itself."""
    return {} if suite.is_cuda else {"kv_cache_memory": 64 << 20}


def _streams(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"


def _maker(
    suite: Suite, name: str, lengths: tuple[int, int], voice: int | None
) -> Callable[[int], EngineCoreRequest]:
    """Requests whose texts differ, and whose frames spread around the middle by a third.

    Texts are of this name alone, or the cache would have them from an earlier case.
    """
    num_positions, num_frames = lengths
    first_seed = zlib.crc32(name.encode())
    spread = np.random.default_rng(0).uniform(2 / 3, 4 / 3, 10_000)
    shortest = suite.config.num_codebooks + 2

    def make(number: int) -> EngineCoreRequest:
        return make_request(
            suite,
            f"{name}-{number}",
            num_positions=num_positions,
            num_frames=max(round(num_frames * spread[number]), shortest),
            seed=first_seed + number,
            voice=voice,
        )

    return make


def _throughput(
    suite: Suite, core: EngineCore, streams: int, lengths: tuple[int, int], suffix: str = ""
) -> None:
    """Voices that the cache does not know, so that every prompt is computed."""
    name = f"{_streams(streams)}, {lengths[0]} positions + {lengths[1]} frames{suffix}"
    traffic = _drive(suite, core, name, streams, lengths, voice=None)
    bound = _audio_bound(suite, core, streams, lengths)
    suite.add(
        f"audio, {name}",
        traffic.audio_s / traffic.seconds,
        "audio-s/s",
        bound=bound,
        note=f"{len(traffic.replies) / traffic.seconds:.1f} requests/s",
    )


def _with_library_convolutions(suite: Suite, streams: int, *, rounds: bool) -> None:
    """What our own codec kernels are worth: the same traffic with cuDNN's, in float32 or TF32."""
    kind = "TF32" if rounds else "float32"
    if suite.is_over:
        suite.note(f"no time left for convolutions by cuDNN in {kind}")
        return

    def choose() -> None:
        torch.backends.cudnn.allow_tf32 = rounds

    options = {"max_num_seqs": streams, "codec_kernels": "torch"}
    with (
        mock.patch.object(worker_module, "use_float32_convolutions", choose),
        open_core(suite, decodes_audio=True, **options) as core,
    ):
        _throughput(suite, core, streams, suite.scale.short, suffix=f", codec by cuDNN in {kind}")
    torch.backends.cudnn.allow_tf32 = False


def _cached_voice(suite: Suite, core: EngineCore, streams: int) -> None:
    """Times of listeners whose voice is in the cache."""
    name = f"cached voice, {streams}"
    voice = 7
    num_cached, num_new = suite.scale.cached
    lengths = (num_cached + num_new, suite.scale.short[1])
    # What a second request has found stays longest, as the voices of a server do.
    warm = _maker(suite, "warm " + name, lengths, voice)
    drive(core, warm, num_streams=1, num_requests=2)
    before = core._scheduler.stats().prefix_cache_hits
    traffic = _drive(suite, core, name, streams, lengths, voice=voice)
    found = (core._scheduler.stats().prefix_cache_hits - before) / len(traffic.replies)
    first = [1e3 * each.first_audio_s for each in traffic.replies.values()]
    gaps = [1e3 * gap for gap in traffic.gaps_s()] or [0.0]
    suffix = f"{_streams(streams)}, cached voice"
    suite.add(
        f"first audio p95, {suffix}",
        percentile(first, 95),
        "ms",
        bound=1e3 * _first_audio_bound_s(suite, core, streams),
        note=f"p50 {percentile(first, 50):.1f}, p99 {percentile(first, 99):.1f}, "
        f"{found:.0f} of {lengths[0]} positions cached",
        # The last block of a voice is not whole, and its positions are computed with the text.
        is_wrong=found <= num_cached - core._config.cache.block_size,
    )
    suite.add(f"gap between chunks p99, {suffix}", percentile(gaps, 99), "ms")
    suite.add(f"underruns, {suffix}", traffic.num_underruns, "")
    bound = _audio_bound(suite, core, streams, lengths, num_cached=num_cached)
    audio_s = traffic.audio_s / traffic.seconds
    suite.add(f"audio, {suffix}", audio_s, "audio-s/s", bound=bound)


def _drive(
    suite: Suite,
    core: EngineCore,
    name: str,
    streams: int,
    lengths: tuple[int, int],
    *,
    voice: int | None,
) -> Traffic:
    count = streams * suite.scale.requests_per_stream
    # One stream is over in no time, and its percentiles want some replies.
    count = max(count, 12) if suite.is_cuda else count
    make = _maker(suite, name, lengths, voice)
    return drive(core, make, num_streams=streams, num_requests=count)


def _audio_bound(
    suite: Suite,
    core: EngineCore,
    streams: int,
    lengths: tuple[int, int],
    *,
    num_cached: int | None = None,
) -> float:
    """Audio seconds per second if steps, prefills and the codec took their floors, in turn.

    A prompt is half text and half voice, or text behind a voice of ``num_cached`` positions.
    """
    num_positions, num_frames = lengths
    item = suite.scale.dtype.itemsize
    sizes = {"weight_itemsize": item, "kv_itemsize": item}
    context = num_positions + num_frames // 2
    step = floors.decode_step(suite.config, streams, context, **sizes)
    if num_cached is None:
        half = num_positions // 2
        prompt = floors.prefill(suite.config, half, half, **sizes)
    else:
        num_new = num_positions - num_cached
        prompt = floors.prefill(suite.config, num_new, 0, num_cached=num_cached, **sizes)
    audio_s = (num_frames - suite.config.num_codebooks - 1) / core.info.frame_rate
    codec_s = audio_s * operations_per_audio_s(suite) / suite.ceilings.matmul_ops_s
    step_s = step.floor_s(suite.ceilings) / streams
    return audio_s / (num_frames * step_s + prompt.floor_s(suite.ceilings) + codec_s)


def _first_audio_bound_s(suite: Suite, core: EngineCore, streams: int) -> float:
    """One prefill, and as many steps as the first chunk with its context needs."""
    item = suite.scale.dtype.itemsize
    sizes = {"weight_itemsize": item, "kv_itemsize": item}
    num_cached, text = suite.scale.cached
    prompt = floors.prefill(suite.config, text, 0, num_cached=num_cached, **sizes)
    step = floors.decode_step(suite.config, streams, num_cached + text, **sizes)
    num_steps = min(
        DEFAULT_RAMP[0] + _context_frames(suite) + suite.config.num_codebooks, suite.scale.short[1]
    )
    return prompt.floor_s(suite.ceilings) + num_steps * step.floor_s(suite.ceilings)


def _context_frames(suite: Suite) -> int:
    if "context_frames" not in suite.extras:
        codec = load_codec(suite.folder / "codec", device="cpu")
        suite.extras["context_frames"] = codec.context_frames
    return int(suite.extras["context_frames"])


def _stream_is_exact(suite: Suite, core: EngineCore) -> None:
    """What arrived in chunks against one decode of the same frames by the same codec."""
    request = make_request(
        suite, "exact", num_positions=suite.scale.short[0], num_frames=suite.scale.short[1]
    )
    traffic = drive(core, lambda _: request, num_streams=1, num_requests=1)
    (heard,) = traffic.replies.values()
    num_codebooks = core.info.num_codebooks
    delayed = np.frombuffer(heard.codes, np.int16).reshape(-1, num_codebooks)
    codes = core._pattern.undo(delayed, ended=False)
    codec = core._executor._worker._codec  # type: ignore[attr-defined]
    with torch.inference_mode():
        whole = codec.decode(torch.from_numpy(codes.astype(np.int64)).to(suite.device)[None])
    streamed = np.frombuffer(heard.samples, np.float32)
    expected = whole[0].float().cpu().numpy()
    if streamed.shape != expected.shape:
        raise RuntimeError(f"{len(streamed)} samples streamed, {len(expected)} in one decode")
    difference = float(np.abs(streamed - expected).max(initial=0.0))
    # Windows of another length may be convolved in another order, below what 16 bits can tell.
    suite.add(
        "streamed audio against one decode, largest difference",
        difference,
        "",
        note="limit 1e-4",
        is_wrong=not difference <= 1e-4,
    )


def _small_card(suite: Suite, suffix: str, options: dict[str, Any], kv_itemsize: int) -> None:
    """How many sequences fit where the whole engine may take 24 x 10^9 bytes."""
    total = torch.cuda.get_device_properties(suite.device).total_memory
    torch.cuda.reset_peak_memory_stats(suite.device)
    try:
        with open_core(
            suite,
            decodes_audio=True,
            max_num_seqs=192,
            gpu_memory_utilization=min(_SMALL_CARD_BYTES / total, 1.0),
            **options,
        ) as core:
            block_size = core._config.cache.block_size
            blocks_each = -(-_SMALL_CARD_POSITIONS // block_size)
            most = torch.cuda.max_memory_reserved(suite.device) / 1e9
            note = f"{most:.1f} GB reserved at most"
            fitting = core.info.num_kv_blocks // blocks_each
    except ConfigError as error:
        suite.note(f"24 GB{suffix}: {error}")
        return
    per_position = floors.kv_bytes_per_position(suite.config, kv_itemsize)
    weights = _resident_bytes(suite, options)
    bound = (_SMALL_CARD_BYTES - weights) / (_SMALL_CARD_POSITIONS * per_position)
    name = f"sequences of 1,050 positions in 24e9 bytes{suffix}"
    suite.add(name, fitting, "sequences", bound=bound, note=note)


def _resident_bytes(suite: Suite, options: dict[str, Any]) -> float:
    """Weights of both kinds of feed-forward, embeddings and head; not the text head."""
    shapes = floors.matrix_shapes(suite.config)
    sizes = {name: outputs * inputs for name, (outputs, inputs) in shapes.items()}
    per_layer = sizes["qkv"] + sizes["o"] + 2 * (sizes["gate_up"] + sizes["down"])
    linear = suite.config.num_hidden_layers * per_layer + sizes["head"]
    embeddings = suite.config.vocab_size * suite.config.hidden_size + sizes["head"]
    item = suite.scale.dtype.itemsize
    return linear * (1 if options else item) + embeddings * item
