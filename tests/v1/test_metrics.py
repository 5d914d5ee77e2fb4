"""The Prometheus page: names, labels and what is counted when."""

from __future__ import annotations

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from vllm.outputs import FinishReason, SpeechOutput, SpeechStats, Usage
from vllm.v1.engine.messages import SchedulerStats
from vllm.v1.metrics import SpeechMetrics

NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:gpu_cache_usage_perc",
    "vllm:gpu_prefix_cache_queries",
    "vllm:gpu_prefix_cache_hits",
    "vllm:num_preemptions",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:audio_seconds",
    "vllm:request_success",
    "vllm:time_to_first_token_seconds",
    "vllm:time_to_first_audio_seconds",
    "vllm:time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_max_num_generation_tokens",
    "vllm:request_params_n",
    "vllm:request_params_max_tokens",
    "vllm:realtime_factor",
}
USAGE = Usage(prompt_tokens=20, completion_tokens=58, audio_tokens=50)
STATS = SpeechStats(
    audio_duration_s=2.0,
    processing_time_s=0.5,
    queue_time_s=0.1,
    prefill_time_s=0.05,
    decode_time_s=0.29,
    time_to_first_audio_s=0.2,
)


def make_metrics(stats: SchedulerStats | None = None) -> SpeechMetrics:
    return SpeechMetrics("tts", lambda: stats)


def make_last(reason: FinishReason, stats: SpeechStats) -> SpeechOutput:
    return SpeechOutput(
        request_id="r",
        audio=np.zeros(0, np.float32),
        codes=np.zeros((8, 0), np.int16),
        delayed_codes=np.zeros((0, 8), np.int16),
        sample_rate=24_000,
        finish_reason=reason,
        usage=USAGE,
        stats=stats,
    )


def samples_of(metrics: SpeechMetrics) -> dict[str, float]:
    """Sample name (and finish reason) -> value; every sample must carry the model's name."""
    values = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tts"
            if "le" not in sample.labels:
                values[sample.name + sample.labels.get("finished_reason", "")] = sample.value
    return values


def test_every_name_is_on_the_page() -> None:
    page = make_metrics(SchedulerStats()).render().decode()
    assert {family.name for family in text_string_to_metric_families(page)} >= NAMES


def test_a_finished_request_is_counted_once() -> None:
    metrics = make_metrics()
    metrics.observe_finished(make_last(FinishReason.STOP, STATS), max_tokens=100)
    values = samples_of(metrics)
    assert values["vllm:request_success_totalstop"] == 1
    assert values["vllm:prompt_tokens_total"] == 20
    assert values["vllm:generation_tokens_total"] == 58
    assert values["vllm:audio_seconds_total"] == 2.0
    assert values["vllm:realtime_factor_sum"] == 4.0
    assert values["vllm:time_to_first_audio_seconds_sum"] == 0.2
    assert values["vllm:request_inference_time_seconds_sum"] == 0.4
    assert values["vllm:time_per_output_token_seconds_sum"] == 0.29 / 58
    assert values["vllm:request_params_max_tokens_sum"] == 100


def test_what_is_unknown_is_not_observed() -> None:
    metrics = make_metrics()
    metrics.observe_finished(make_last(FinishReason.LENGTH, SpeechStats(processing_time_s=1.0)))
    values = samples_of(metrics)
    for name in (
        "time_to_first_audio_seconds",
        "time_per_output_token_seconds",
        "request_prefill_time_seconds",
        "request_params_max_tokens",
        "realtime_factor",
    ):
        assert values[f"vllm:{name}_count"] == 0


def test_a_failed_request_counts_by_reason_only() -> None:
    metrics = make_metrics()
    metrics.count_failed(FinishReason.ABORT)
    values = samples_of(metrics)
    assert values["vllm:request_success_totalabort"] == 1
    assert values["vllm:e2e_request_latency_seconds_count"] == 0


def test_queues_are_read_at_the_scrape() -> None:
    stats = SchedulerStats(num_running=3, num_waiting=2, kv_cache_usage=0.5, num_preemptions=7)
    values = samples_of(make_metrics(stats))
    assert values["vllm:num_requests_running"] == 3
    assert values["vllm:num_requests_waiting"] == 2
    assert values["vllm:gpu_cache_usage_perc"] == 0.5
    assert values["vllm:num_preemptions_total"] == 7


def test_no_queues_without_an_engine() -> None:
    assert "vllm:num_requests_running" not in samples_of(make_metrics())
