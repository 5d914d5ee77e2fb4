"""How many KV blocks fit: the arithmetic, and a clear word when they do not.

Plain numbers in, a block count out; measuring memory is the worker's business.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.exceptions import ConfigError

__all__ = ["CardMemory", "KVBudget", "StepSizes", "num_kv_blocks"]

_GIB = 2**30
_SHARE_OF_HOST = 0.5  # of a host's free memory, when nobody said how much

# What a card needs beside weights and pages. Estimates: none was measured on a card.
_BYTES_PER_GRAPH = 8 * 2**20
_BYTES_PER_CODEC_GRAPH = 2 * 2**20  # a quarter of the launches
_LIVE_TENSORS = 3  # as wide as the widest, in a step
_LIVE_CODEC_TENSORS = 4  # the same, in a codec's last and widest layers
_CODEC_CHANNELS = 32  # of these, per sample
_CODEC_WIDTH_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What decides how much memory steps take, beside weights and pages."""

    num_graphs: int
    max_rows: int  # of a step, prefill included
    widest_row: int  # numbers in the widest row of activations
    bytes_per_number: int
    num_codec_graphs: int
    codec_batch: int  # windows decoded together
    codec_samples: int  # of the longest window

    @property
    def graph_bytes(self) -> int:
        """Recorded steps and batches of windows."""
        return self.num_graphs * _BYTES_PER_GRAPH + self.num_codec_graphs * _BYTES_PER_CODEC_GRAPH

    @property
    def activation_bytes(self) -> int:
        """The largest step."""
        return self.max_rows * self.widest_row * self.bytes_per_number * _LIVE_TENSORS

    @property
    def codec_bytes(self) -> int:
        """The largest batch of windows."""
        per_sample = _LIVE_CODEC_TENSORS * _CODEC_CHANNELS * _CODEC_WIDTH_BYTES
        return self.codec_batch * self.codec_samples * per_sample


@dataclass(frozen=True, kw_only=True)
class CardMemory:
    """A card's memory in bytes, when weights and codec are on it and the KV cache is not.

    Attributes:
        total_bytes: of the card.
        utilization: share of it that the engine may use, ``--gpu-memory-utilization``.
        used_bytes: by weights, codec, CUDA itself, and other programs.
        sizes: what the steps will take.
    """

    total_bytes: int
    utilization: float
    used_bytes: int
    sizes: StepSizes

    @property
    def available_bytes(self) -> int:
        """What is left for the KV cache; negative where even that does not fit."""
        sizes = self.sizes
        reserved = sizes.graph_bytes + sizes.activation_bytes + sizes.codec_bytes
        return int(self.total_bytes * self.utilization) - self.used_bytes - reserved

    @property
    def arithmetic(self) -> str:
        """How ``available_bytes`` comes about."""
        sizes = self.sizes
        return (
            f"{_gib(self.total_bytes)} on the card x {self.utilization:g} "
            f"- {_gib(self.used_bytes)} in use (weights, codec, other programs) "
            f"- {_gib(sizes.graph_bytes)} for {sizes.num_graphs} graphs "
            f"and {sizes.num_codec_graphs} of the codec "
            f"- {_gib(sizes.activation_bytes)} for steps of {sizes.max_rows} rows "
            f"- {_gib(sizes.codec_bytes)} for {sizes.codec_batch} codec windows "
            f"= {_gib(self.available_bytes)}"
        )


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
        arithmetic: how that came about.
    """

    bytes_per_block: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    requested_bytes: int
    available_bytes: int
    arithmetic: str

    @classmethod
    def of_host(cls, free_bytes: int, **sizes: int) -> KVBudget:
        """On a CPU, whose memory is shared with all else."""
        available_bytes = int(free_bytes * _SHARE_OF_HOST)
        arithmetic = f"{_gib(free_bytes)} free x {_SHARE_OF_HOST:g} = {_gib(available_bytes)}"
        return cls(**sizes, available_bytes=available_bytes, arithmetic=arithmetic)

    @classmethod
    def of_card(cls, memory: CardMemory, **sizes: int) -> KVBudget:
        """On a card, all that is left of the share that the engine may use."""
        return cls(**sizes, available_bytes=memory.available_bytes, arithmetic=memory.arithmetic)

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
        num_blocks = min(useful, max(budget.available_bytes, 0) // budget.bytes_per_block)
    if num_blocks < budget.blocks_per_request:
        needed = budget.blocks_per_request * budget.bytes_per_block
        raise ConfigError(
            f"the KV cache has room for {num_blocks} blocks of {budget.block_size} positions, "
            f"{budget.bytes_per_block:,} bytes each; one request of --max-model-len "
            f"{budget.max_model_len} needs {budget.blocks_per_request} blocks = "
            f"{_gib(needed)}, and there are {budget.arithmetic}; "
            "lower --max-model-len or raise --kv-cache-memory or --gpu-memory-utilization"
        )
    return num_blocks


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
