"""Building blocks of decoders: each owns its weights and names the checkpoint tensors they take.

A layer's ``targets(prefix)`` maps checkpoint names to the tensors, or views of packed tensors,
that they fill. Layers know no model and no request.
"""

from vllm.model_executor.layers.attention import SelfAttention
from vllm.model_executor.layers.embedding import CodebookEmbedding, Embedding
from vllm.model_executor.layers.feed_forward import FeedForward
from vllm.model_executor.layers.layer import Layer
from vllm.model_executor.layers.linear import GatedLinear, Linear, PackedLinear
from vllm.model_executor.layers.norm import RMSNorm
from vllm.model_executor.layers.rotary import RotaryTable, inverse_frequencies

__all__ = [
    "CodebookEmbedding",
    "Embedding",
    "FeedForward",
    "GatedLinear",
    "Layer",
    "Linear",
    "PackedLinear",
    "RMSNorm",
    "RotaryTable",
    "SelfAttention",
    "inverse_frequencies",
]
