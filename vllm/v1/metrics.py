"""Counters and histograms of the server, and the page that Prometheus reads.

Names are those that dashboards of vLLM know, plus those of speech. Takes plain values from the
reply side and queue states from the engine; measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm.outputs import FinishReason, SpeechOutput, SpeechStats, Usage

if TYPE_CHECKING:
    from vllm.v1.engine.messages import SchedulerStats

__all__ = ["CONTENT_TYPE", "SpeechMetrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LABEL = "model_name"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 40, 80, 160)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.5, 1)
_TOKENS = (1, 10, 25, 50, 100, 200, 400, 800, 1600, 3200, 6400, 12800)
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
}

_COUNTERS: dict[str, str] = {
    "prompt_tokens": "prompt positions, of all requests",
    "generation_tokens": "generated frames, of all requests",
    "audio_seconds": "seconds of audio made",
}


class SpeechMetrics:
    """Metrics of one server, in a registry of their own.

    Args:
        model_name: value of the ``model_name`` label.
        scheduler_stats: state of the engine's queues, asked for at each scrape; None while there
            is no engine.
    """

    def __init__(
        self, model_name: str, scheduler_stats: Callable[[], SchedulerStats | None]
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_QueueCollector(model_name, scheduler_stats))
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

    def render(self) -> bytes:
        """The page in Prometheus' text form."""
        return generate_latest(self._registry)


def _per_token(usage: Usage, stats: SpeechStats) -> float | None:
    if stats.time_to_first_audio_s is None or not usage.completion_tokens:
        return None
    return (stats.decode_time_s or stats.processing_time_s) / usage.completion_tokens


class _QueueCollector(Collector):
    """Reads the engine's queues when the page is asked for, so nothing is kept twice."""

    def __init__(
        self, model_name: str, scheduler_stats: Callable[[], SchedulerStats | None]
    ) -> None:
        self._model_name = model_name
        self._scheduler_stats = scheduler_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._scheduler_stats()
        if stats is None:
            return
        yield self._gauge("num_requests_running", "requests being decoded", stats.num_running)
        yield self._gauge("num_requests_waiting", "requests not yet started", stats.num_waiting)
        yield self._gauge(
            "num_requests_finishing", "generated, audio under way", stats.num_finishing
        )
        yield self._gauge(
            "gpu_cache_usage_perc", "share of the KV cache in use", stats.kv_cache_usage
        )
        yield self._counter(
            "gpu_prefix_cache_queries", "prompt positions looked up", stats.prefix_cache_queries
        )
        yield self._counter(
            "gpu_prefix_cache_hits", "prompt positions found", stats.prefix_cache_hits
        )
        yield self._counter("num_preemptions", "requests set aside", stats.num_preemptions)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=[_LABEL])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=[_LABEL])
        family.add_metric([self._model_name], value)
        return family
