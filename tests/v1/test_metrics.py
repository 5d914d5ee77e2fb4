"""The Prometheus page: names, labels and what is counted when."""

from __future__ import annotations

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from vllm.outputs import FinishReason, SpeechOutput, SpeechStats, Usage
from vllm.player import VirtualPlayer
from vllm.v1.engine.messages import STEP_TOKEN_BUCKETS, EngineStats, SchedulerStats
from vllm.v1.metrics import SpeechMetrics
from vllm.v1.outputs import CodecStats

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
    "vllm:iteration_tokens_total",
    "vllm:clip_cache_queries",
    "vllm:clip_cache_hits",
    "vllm:codec_windows_waiting",
    "vllm:codec_windows",
    "vllm:codec_decode_seconds",
    "vllm:codec_clips",
    "vllm:codec_encode_seconds",
    "vllm:player_streams",
    "vllm:player_stalled_streams",
    "vllm:player_underruns",
    "vllm:player_stall_seconds",
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


def make_metrics(stats: EngineStats | None = None) -> SpeechMetrics:
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
    page = make_metrics(EngineStats()).render().decode()
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
    values = samples_of(make_metrics(EngineStats(stats)))
    assert values["vllm:num_requests_running"] == 3
    assert values["vllm:num_requests_waiting"] == 2
    assert (values["vllm_num_requests_running"], values["vllm_num_requests_waiting"]) == (3, 2)
    assert values["vllm:gpu_cache_usage_perc"] == 0.5
    assert values["vllm:num_preemptions_total"] == 7


def test_no_queues_without_an_engine() -> None:
    assert "vllm:num_requests_running" not in samples_of(make_metrics())


def test_figures_of_codec_and_clips_are_the_engines() -> None:
    codec = CodecStats(
        num_waiting=2, num_windows=9, decode_time_s=0.5, num_clips=3, encode_time_s=1.5
    )
    stats = EngineStats(codec=codec, num_clip_queries=8, num_clip_hits=5)
    values = samples_of(make_metrics(stats))
    assert values["vllm:codec_windows_waiting"] == 2
    assert values["vllm:codec_windows_total"] == 9
    assert values["vllm:codec_decode_seconds_total"] == 0.5
    assert values["vllm:codec_clips_total"] == 3
    assert values["vllm:codec_encode_seconds_total"] == 1.5
    assert values["vllm:clip_cache_queries_total"] == 8
    assert values["vllm:clip_cache_hits_total"] == 5


def test_sizes_of_steps_are_a_histogram() -> None:
    counts = (3, 2, *([0] * (len(STEP_TOKEN_BUCKETS) - 2)), 1)
    stats = SchedulerStats(step_token_counts=counts, num_step_tokens=9_013)
    metrics = make_metrics(EngineStats(stats))
    values = samples_of(metrics)
    assert values["vllm:iteration_tokens_total_count"] == 6
    assert values["vllm:iteration_tokens_total_sum"] == 9_013
    buckets = {
        sample.labels["le"]: sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == "vllm:iteration_tokens_total_bucket"
    }
    assert (buckets["1.0"], buckets["8.0"], buckets["8192.0"], buckets["+Inf"]) == (3, 5, 5, 6)


def test_underruns_are_counted_by_stream_and_by_length() -> None:
    metrics = make_metrics()
    stalling, steady, silent = VirtualPlayer(), VirtualPlayer(), VirtualPlayer()
    for now in (0.0, 1.5, 2.75):
        stalling.feed(now, 1.0)
    steady.feed(0.0, 1.0)
    for player in (stalling, steady, silent):
        metrics.observe_player(player)
    values = samples_of(metrics)
    assert values["vllm:player_streams_total"] == 2
    assert values["vllm:player_stalled_streams_total"] == 1
    assert values["vllm:player_underruns_total"] == 2
    assert values["vllm:player_stall_seconds_count"] == 2
    assert values["vllm:player_stall_seconds_sum"] == 0.75
