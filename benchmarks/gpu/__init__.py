"""The parts of ``benchmarks.gpu_suite``: one section per module, and what the sections share.

Needs what a bare CUDA image has: torch, Triton, numpy, safetensors, tokenizers.
"""
