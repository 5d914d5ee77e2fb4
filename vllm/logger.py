"""Named loggers with one line format; knows nothing of what is logged.

A request id given as ``extra={"request_id": ...}`` is written in brackets before the message.
"""

from __future__ import annotations

import logging
import sys

from vllm import envs

__all__ = ["configure_logging", "get_logger"]

_ROOT = "vllm"


class _RequestIdFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        request_id = getattr(record, "request_id", None)
        return line if request_id is None else f"{line} [{request_id}]"


def get_logger(name: str) -> logging.Logger:
    """Logger below the package's root logger; ``name`` is usually ``__name__``."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def configure_logging(level: str | None = None) -> None:
    """Write the package's log lines to standard error. Called by programs, never by the library.

    Args:
        level: a level name such as ``"info"``; default is ``VLLM_LOGGING_LEVEL``.
    """
    root = logging.getLogger(_ROOT)
    root.setLevel((level or envs.VLLM_LOGGING_LEVEL).upper())
    if root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _RequestIdFormatter("%(levelname).1s %(asctime)s %(name)s: %(message)s", "%m-%d %H:%M:%S")
    )
    root.addHandler(handler)
    root.propagate = False
