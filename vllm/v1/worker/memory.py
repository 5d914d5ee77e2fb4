"""How many KV blocks fit: the arithmetic, and a clear word when they do not.

Plain numbers in, a block count out; measuring memory is the worker's business.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.exceptions import ConfigError

__all__ = ["KVBudget", "num_kv_blocks"]

_GIB = 2**30
_MAX_SHARE_OF_FREE = 0.5  # of the memory that is left, when nobody said how much


@dataclass(frozen=True)
class KVBudget:
    """What bounds the KV cache, in bytes and positions.

    Attributes:
        bytes_per_block: over all layers.
        block_size: positions per block.
        max_model_len: positions of one request.
        max_num_seqs: requests that run together.
        requested_bytes: ``--kv-cache-memory``; 0 leaves the choice to the budget.
        available_bytes: what may be used at most, after weights and codec.
    """

    bytes_per_block: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    requested_bytes: int
    available_bytes: int

    @property
    def blocks_per_request(self) -> int:
        """Blocks of one request of full length."""
        return -(-self.max_model_len // self.block_size)


def num_kv_blocks(budget: KVBudget) -> int:
    """Blocks of the KV cache: as asked for, else as many as can be used and fit.

    Raises:
        ConfigError: not even one request of full length fits; the message holds the arithmetic.
    """
    if budget.requested_bytes:
        num_blocks = budget.requested_bytes // budget.bytes_per_block
    else:
        useful = budget.blocks_per_request * budget.max_num_seqs
        usable_bytes = int(budget.available_bytes * _MAX_SHARE_OF_FREE)
        num_blocks = min(useful, max(usable_bytes, 0) // budget.bytes_per_block)
    if num_blocks < budget.blocks_per_request:
        needed = budget.blocks_per_request * budget.bytes_per_block
        raise ConfigError(
            f"the KV cache has room for {num_blocks} blocks of {budget.block_size} positions, "
            f"{budget.bytes_per_block:,} bytes each; one request of --max-model-len "
            f"{budget.max_model_len} needs {budget.blocks_per_request} blocks = "
            f"{needed / _GIB:.2f} GiB, and {budget.available_bytes / _GIB:.2f} GiB are left after "
            "weights and codec; lower --max-model-len or raise --kv-cache-memory or "
            "--gpu-memory-utilization"
        )
    return num_blocks
