"""From a prompt to its audio: the engine core and, on the other side of a border, its clients.

Nothing is imported here: ``core`` loads torch, and everything else must not.
"""

from __future__ import annotations

__all__: list[str] = []
