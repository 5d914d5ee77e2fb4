"""Scheduling without a model: queues, blocks and the plan of each step.

Knows positions, frames and ends; no torch, no tensors and no model names.
"""

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager, hash_prompt_blocks
from vllm.v1.core.sched_output import NewRequestData, PrefillChunk, SchedulerOutput, StepKind
from vllm.v1.core.scheduler import Scheduler

__all__ = [
    "BlockPool",
    "KVCacheManager",
    "NewRequestData",
    "PrefillChunk",
    "Scheduler",
    "SchedulerOutput",
    "StepKind",
    "hash_prompt_blocks",
]
