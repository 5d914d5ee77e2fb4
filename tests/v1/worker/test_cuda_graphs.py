"""How CUDA graphs are recorded, with stand-ins for torch's own, and what sizes there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from vllm.v1.worker.cuda_graphs import CudaGraphs

CARD = torch.device("cuda", 0)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options of every graph that is recorded; streams are tuples of device and priority."""
    made: list[dict[str, Any]] = []
    pools = iter(range(10))

    class Graph:
        def replay(self) -> None:
            made[-1]["replays"] = made[-1].get("replays", 0) + 1

    @contextmanager
    def graph(graph: Graph, **options: Any) -> Iterator[None]:
        made.append(options)
        yield

    class Stream:
        def __init__(self, device: torch.device, priority: int = 0) -> None:
            self.priority = priority

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    return made


def test_graphs_of_one_kind_share_a_pool_and_a_stream(recordings: list[dict[str, Any]]) -> None:
    steps, windows = CudaGraphs(CARD, is_urgent=True), CudaGraphs(CARD)
    ran = []
    for graphs in (steps, steps, windows):
        graphs.record(lambda: ran.append(1))
    assert len(ran) == 3
    first, second, other = recordings
    assert (first["pool"], first["stream"]) == (second["pool"], second["stream"])
    # Whatever runs side by side has memory and workspaces of its own.
    assert other["pool"] != first["pool"]
    assert other["stream"] is not first["stream"]
    assert first["stream"].priority < other["stream"].priority
    assert {each["capture_error_mode"] for each in recordings} == {"thread_local"}


def test_recording_runs_once_and_replaying_not_at_all(recordings: list[dict[str, Any]]) -> None:
    ran = []
    replay = CudaGraphs(CARD).record(lambda: ran.append(1))
    replay()
    replay()
    assert len(ran) == 1
    assert recordings[0]["replays"] == 2
