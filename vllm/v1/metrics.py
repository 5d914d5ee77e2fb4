"""Counters and histograms of the server, and the page that Prometheus reads.

Names are those that dashboards of vLLM know, plus those of speech. Takes plain values from the
reply side and the engine's own figures; measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from vllm.outputs import FinishReason, SpeechOutput, SpeechStats, Usage
from vllm.player import VirtualPlayer
from vllm.v1.engine.messages import STEP_TOKEN_BUCKETS

if TYPE_CHECKING:
    from vllm.v1.engine.messages import EngineStats, SchedulerStats

__all__ = ["CONTENT_TYPE", "CacheStats", "SpeechMetrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LABEL = "model_name"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 40, 80, 160)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.5, 1)
_TOKENS = (1, 10, 25, 50, 100, 200, 400, 800, 1600, 3200, 6400, 12800)
_STALL_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_FACTORS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)

# name -> (help, buckets)
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("arrival to the first audio", _SECONDS),
    "time_to_first_audio_seconds": ("arrival to the first audio", _SECONDS),
    "time_per_output_token_seconds": ("seconds per generated frame", _STEP_SECONDS),
    "e2e_request_latency_seconds": ("arrival to the last sample", _SECONDS),
    "request_queue_time_seconds": ("arrival to the first prefill step", _SECONDS),
    "request_inference_time_seconds": ("first prefill step to the last sample", _SECONDS),
    "request_prefill_time_seconds": ("first prefill step to the first frame", _SECONDS),
    "request_decode_time_seconds": ("first frame to the last", _SECONDS),
    "request_prompt_tokens": ("prompt positions of a request", _TOKENS),
    "request_generation_tokens": ("generated frames of a request", _TOKENS),
    "request_max_num_generation_tokens": ("frames that a request could have had", _TOKENS),
    "request_params_n": ("replies asked for", (1,)),
    "request_params_max_tokens": ("max_tokens of a request that gave one", _TOKENS),
    "realtime_factor": ("audio seconds per second of processing", _FACTORS),
    "player_stall_seconds": ("how long each underrun lasted", _STALL_SECONDS),
}

_COUNTERS: dict[str, str] = {
    "prompt_tokens": "prompt positions, of all requests",
    "generation_tokens": "generated frames, of all requests",
    "audio_seconds": "seconds of audio made",
    "player_streams": "replies whose audio was sent while it was made",
    "player_stalled_streams": "of these, the ones with an underrun",
    "player_underruns": "times at which their audio ran out before there was more",
}


@dataclass(frozen=True)
class CacheStats:
    """The cache of finished replies: counts since the start, and what it holds now."""

    num_queries: int = 0
    num_hits: int = 0
    num_replies: int = 0
    num_bytes: int = 0


class SpeechMetrics:
    """Metrics of one server, in a registry of their own.

    Args:
        model_name: value of the ``model_name`` label.
        engine_stats: figures of the engine, asked for at each scrape; None while there is none.
        cache_stats: figures of the cache of finished replies, where there is one.
    """

    def __init__(
        self,
        model_name: str,
        engine_stats: Callable[[], EngineStats | None],
        cache_stats: Callable[[], CacheStats] | None = None,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, engine_stats))
        if cache_stats is not None:
            self._registry.register(_CacheCollector(model_name, cache_stats))
        self._histograms = {
            name: Histogram(
                f"vllm:{name}", text, [_LABEL], registry=self._registry, buckets=buckets
            ).labels(model_name)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._counters = {
            name: Counter(f"vllm:{name}", text, [_LABEL], registry=self._registry).labels(
                model_name
            )
            for name, text in _COUNTERS.items()
        }
        finished = Counter(
            "vllm:request_success",
            "requests by the way they ended",
            [_LABEL, "finished_reason"],
            registry=self._registry,
        )
        self._finished = {
            reason: finished.labels(model_name, reason.value) for reason in FinishReason
        }

    def observe_finished(self, last: SpeechOutput, *, max_tokens: int | None = None) -> None:
        """Count a request that ran to its end, whatever that was; ``last`` is its last output."""
        assert last.finish_reason is not None, "only the last output tells all"
        usage, stats = last.usage, last.stats
        self._finished[last.finish_reason].inc()
        self._counters["prompt_tokens"].inc(usage.prompt_tokens)
        self._counters["generation_tokens"].inc(usage.completion_tokens)
        self._counters["audio_seconds"].inc(stats.audio_duration_s)
        observed: dict[str, float | None] = {
            "time_to_first_token_seconds": stats.time_to_first_audio_s,
            "time_to_first_audio_seconds": stats.time_to_first_audio_s,
            "time_per_output_token_seconds": _per_token(usage, stats),
            "e2e_request_latency_seconds": stats.processing_time_s,
            "request_queue_time_seconds": stats.queue_time_s,
            "request_inference_time_seconds": stats.processing_time_s - stats.queue_time_s,
            "request_prefill_time_seconds": stats.prefill_time_s or None,
            "request_decode_time_seconds": stats.decode_time_s or None,
            "request_prompt_tokens": usage.prompt_tokens,
            "request_generation_tokens": usage.completion_tokens,
            "request_max_num_generation_tokens": max_tokens or usage.completion_tokens,
            "request_params_n": 1,
            "request_params_max_tokens": max_tokens,
            "realtime_factor": stats.realtime_factor or None,
        }
        for name, value in observed.items():
            if value is not None:
                self._histograms[name].observe(value)

    def count_failed(self, reason: FinishReason) -> None:
        """Count a request that ended without usage: aborted, failed or out of time."""
        self._finished[reason].inc()

    def observe_player(self, player: VirtualPlayer) -> None:
        """Count a listener who has left, or who never heard anything."""
        if not player.has_started:
            return
        self._counters["player_streams"].inc()
        self._counters["player_stalled_streams"].inc(bool(player.stalls_s))
        self._counters["player_underruns"].inc(len(player.stalls_s))
        for stall_s in player.stalls_s:
            self._histograms["player_stall_seconds"].observe(stall_s)

    def render(self) -> bytes:
        """The page in Prometheus' text form."""
        return generate_latest(self._registry)


def _per_token(usage: Usage, stats: SpeechStats) -> float | None:
    if stats.time_to_first_audio_s is None or not usage.completion_tokens:
        return None
    return (stats.decode_time_s or stats.processing_time_s) / usage.completion_tokens


class _Collector(Collector):
    """Reads figures when the page is asked for, so nothing is kept twice."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name

    def _gauge(self, name: str, text: str, value: float, separator: str = ":") -> Metric:
        family = GaugeMetricFamily(f"vllm{separator}{name}", text, labels=[_LABEL])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=[_LABEL])
        family.add_metric([self._model_name], value)
        return family


class _CacheCollector(_Collector):
    def __init__(self, model_name: str, cache_stats: Callable[[], CacheStats]) -> None:
        super().__init__(model_name)
        self._cache_stats = cache_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._cache_stats()
        yield self._counter(
            "response_cache_queries", "requests looked up among finished replies", stats.num_queries
        )
        yield self._counter("response_cache_hits", "requests found there", stats.num_hits)
        yield self._gauge("response_cache_replies", "replies that are kept", stats.num_replies)
        yield self._gauge("response_cache_bytes", "bytes that they take", stats.num_bytes)


class _EngineCollector(_Collector):
    def __init__(self, model_name: str, engine_stats: Callable[[], EngineStats | None]) -> None:
        super().__init__(model_name)
        self._engine_stats = engine_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._engine_stats()
        if stats is None:
            return
        queues, codec = stats.scheduler, stats.codec
        gauge, counter = self._gauge, self._counter
        for separator in ":_":  # older documents look for the second form
            yield gauge(
                "num_requests_running", "requests being decoded", queues.num_running, separator
            )
            yield gauge(
                "num_requests_waiting", "requests not yet started", queues.num_waiting, separator
            )
        yield gauge("num_requests_finishing", "generated, audio under way", queues.num_finishing)
        yield gauge("gpu_cache_usage_perc", "share of the KV cache in use", queues.kv_cache_usage)
        yield gauge(
            "num_pinned_blocks", "blocks kept for the voices' prompts", queues.num_pinned_blocks
        )
        yield counter(
            "gpu_prefix_cache_queries", "prompt positions looked up", queues.prefix_cache_queries
        )
        yield counter("gpu_prefix_cache_hits", "prompt positions found", queues.prefix_cache_hits)
        yield counter("num_preemptions", "requests set aside", queues.num_preemptions)
        yield self._step_tokens(queues)
        yield counter("clip_cache_queries", "reference clips looked up", stats.num_clip_queries)
        yield counter("clip_cache_hits", "reference clips found", stats.num_clip_hits)
        yield gauge("codec_windows_waiting", "pieces of audio to be decoded", codec.num_waiting)
        yield counter("codec_windows", "pieces of audio decoded", codec.num_windows)
        yield counter("codec_decode_seconds", "time spent on decoding them", codec.decode_time_s)
        yield counter("codec_clips", "reference clips encoded", codec.num_clips)
        yield counter("codec_encode_seconds", "time spent on encoding them", codec.encode_time_s)

    def _step_tokens(self, stats: SchedulerStats) -> Metric:
        """A histogram by the name that it has in vLLM, though it looks like a counter's."""
        bounds = [*(f"{bound:.1f}" for bound in STEP_TOKEN_BUCKETS), "+Inf"]
        counts = [float(count) for count in accumulate(stats.step_token_counts)]
        name, text = "vllm:iteration_tokens_total", "prompt positions and frames of a step"
        family = HistogramMetricFamily(name, text, labels=[_LABEL])
        buckets = list(zip(bounds, counts, strict=True))
        family.add_metric([self._model_name], buckets, stats.num_step_tokens)
        return family
