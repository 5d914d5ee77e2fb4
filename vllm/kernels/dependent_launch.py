"""Whether kernels of a step start before the ones ahead have ended. Knows no kernel.

Programmatic dependent launch, from compute capability 9.0 on: a kernel's programs come to the
device while the kernel ahead still runs, and each waits inside until that one is done and its
writes are seen (``griddepcontrol``).
"""

from __future__ import annotations

from enum import Enum

__all__ = ["DependentLaunch"]


class DependentLaunch(Enum):
    """The values of ``--dependent-launch``."""

    OFF = "off"
    ON = "on"
    PREFETCH = "prefetch"  # and ask L2 for the first weights before the wait

    @property
    def is_on(self) -> bool:
        return self is not DependentLaunch.OFF

    @property
    def prefetches(self) -> bool:
        return self is DependentLaunch.PREFETCH
