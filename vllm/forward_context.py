"""What the layers need to know about the step that runs now, as one ``with`` block.

Carries metadata from the runner to the attention layers past the model; computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from vllm.kernels.attention import AttentionMetadata

__all__ = ["ForwardContext", "get_forward_context", "set_forward_context"]


@dataclass(frozen=True)
class ForwardContext:
    """Metadata of one step.

    ``kv_caches`` has one tensor per layer, [2, num_blocks, num_kv_heads, block_size, head_dim].
    """

    attn_metadata: AttentionMetadata
    kv_caches: Sequence[Tensor]


_current: ForwardContext | None = None


@contextmanager
def set_forward_context(
    attn_metadata: AttentionMetadata, kv_caches: Sequence[Tensor]
) -> Iterator[ForwardContext]:
    """Make the metadata visible to the layers until the block ends, however it ends."""
    global _current
    if _current is not None:
        raise RuntimeError("a forward context is set already; contexts do not nest")
    _current = ForwardContext(attn_metadata, kv_caches)
    try:
        yield _current
    finally:
        _current = None


def get_forward_context() -> ForwardContext:
    """The context of the step that runs now."""
    if _current is None:
        raise RuntimeError("no forward context; call the model inside set_forward_context")
    return _current
