"""Triton kernels for CUDA devices: one module per operation, each with its kernel and its launcher.

Faces in ``vllm.kernels`` import these modules when they first meet a CUDA tensor, so nothing else
needs Triton. ``offline`` compiles a kernel for a card that is not here. Knows no model.
"""

__all__ = ["offline"]
