"""How workers are started and called."""

from __future__ import annotations

from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc import UniProcExecutor

__all__ = ["Executor", "UniProcExecutor"]
