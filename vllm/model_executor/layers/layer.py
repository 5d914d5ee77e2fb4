"""What every layer of a model is: a module whose call is its forward.

A decode step of a small model is bound by calls, and the hooks that ``nn.Module`` looks for at
each of them are not used here.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Layer"]


class Layer(nn.Module):
    """Parameters and submodules as in ``nn.Module``, without its hooks."""

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)
