"""Tensor operations by name; the only Python that may call native or Triton code.

``reference`` is the plain torch form of each operation and the definition of correct,
``linear`` makes matrix products independent of the batch, ``cache`` and ``attention`` work on
the paged KV cache. Nothing here knows a model.
"""
