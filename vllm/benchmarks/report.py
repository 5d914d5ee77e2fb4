"""A load point as text for people, as JSON and as a picture.

Knows nothing of how it was measured.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm.benchmarks.figures import PERCENTILES

__all__ = ["format_report", "plot_point", "write_results"]

_WIDTH = 60
_LABEL_WIDTH = 24
_SHOWN_PERCENTILES = ("p50", "p90", "p95")


def format_report(point: Mapping[str, Any], configuration: Mapping[str, object]) -> str:
    """Sections of aligned lines, the verdict last."""
    first, rtf = point["time_to_first_audio_s"], point["rtf"]
    num_good = point["num_requests"] - point["num_failures"]
    sections: dict[str, dict[str, object]] = {
        "configuration": {**configuration, "wall time": f"{point['wall_s']:.2f} s"},
        "time to first byte (TTFB)": {
            p.upper(): f"{first[p] * 1000:.1f} ms" for p in _SHOWN_PERCENTILES if p in first
        },
        "real-time factor (RTF), processing / audio": {
            p.upper(): f"{rtf[p]:.3f}" for p in _SHOWN_PERCENTILES if p in rtf
        },
        "throughput": {
            "successful": f"{num_good} of {point['num_requests']}",
            "requests": f"{point['requests_per_s']:.2f} per s",
            "audio": f"{point['audio_s']:.1f} s",
            "XRT": f"{point['audio_s_per_s']:.2f} audio s per s",
        },
        "playback": {
            "underruns": f"{point['num_underruns']} in {point['num_requests_with_underruns']} replies",
            "stalled": f"{point['stalled_s']:.2f} s",
        },
    }
    lines = ["=" * _WIDTH]
    for title, rows in sections.items():
        lines.append(f" {title} ".center(_WIDTH, "-"))
        lines += [f"  {name + ':':<{_LABEL_WIDTH}}{value}" for name, value in rows.items()]
        if not rows:
            lines.append("  no successful request")
    lines += _failure_lines(point)
    verdict = "yes" if point["is_realtime_capable"] else "no"
    lines += ["-" * _WIDTH, f"real-time capable: {verdict} (P95 RTF < 1)", "=" * _WIDTH]
    return "\n".join(lines)


def write_results(path: Path, results: Mapping[str, Any], *, command: str) -> None:
    """Write JSON: the results, and when, where and by what command they were measured."""
    circumstances = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "client": platform.platform(),
        "command": command,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"circumstances": circumstances, **results}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def plot_point(point: Mapping[str, Any], path: Path) -> None:
    """Percentiles of time to first byte and real-time factor, as a PNG; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [f"P{p}" for p in PERCENTILES]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    first = [1000 * point["time_to_first_audio_s"].get(f"p{p}", 0.0) for p in PERCENTILES]
    rtf = [point["rtf"].get(f"p{p}", 0.0) for p in PERCENTILES]
    left.bar(names, first)
    left.set(title="Time to first byte", ylabel="ms")
    right.bar(names, rtf)
    right.axhline(1.0, color="black", linewidth=1, linestyle="--")
    right.set(title="Real-time factor", ylabel="processing seconds per audio second")
    figure.suptitle(
        f"{point['load']['name']}, {point['audio_s_per_s']:.2f} audio s per s, "
        f"{point['num_underruns']} underruns, {point['num_failures']} failures"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


def _failure_lines(point: Mapping[str, Any]) -> list[str]:
    if not point["num_failures"]:
        return []
    lines = [f" failures: {point['num_failures']} ".center(_WIDTH, "-")]
    lines += [f"  {count} x {kind}" for kind, count in point["failures"].items()]
    return lines + [f"  e.g. {example}" for example in point["failure_examples"]]
