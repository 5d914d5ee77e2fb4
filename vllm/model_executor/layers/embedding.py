"""Tables that turn ids into vectors: one id per position, or one code per codebook.

Knows no placeholder rule: which table a position takes is the caller's to say.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm.kernels.embed_codes import embed_codes
from vllm.model_executor.layers.layer import Layer

__all__ = ["CodebookEmbedding", "Embedding"]


class Embedding(Layer):
    """Row ``id`` of a table [num_embeddings, size]."""

    def __init__(self, num_embeddings: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.empty(num_embeddings, size, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [N] -> [N, size]."""
        return F.embedding(ids, self.weight)

    def targets(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}.weight": self.weight}


class CodebookEmbedding(Embedding):
    """Sum over codebooks of one row each; code ``c`` of codebook ``k`` has row ``k * size + c``."""

    offsets: Tensor  # int64 [num_codebooks]

    def __init__(
        self, num_codebooks: int, codebook_size: int, hidden_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__(num_codebooks * codebook_size, hidden_size, dtype)
        offsets = torch.arange(num_codebooks) * codebook_size
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """int64 [N, num_codebooks] -> [N, hidden_size]."""
        return embed_codes(codes, self.weight, self.offsets)
