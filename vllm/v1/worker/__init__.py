"""The device side of the engine: rows, pages, model steps and the codec beside them."""

from __future__ import annotations

from vllm.v1.worker.worker import Worker, WorkerInfo

__all__ = ["Worker", "WorkerInfo"]
