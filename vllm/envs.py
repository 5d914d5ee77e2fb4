"""Every environment variable that the package reads, typed, with its meaning.

A value that does not parse is an error when it is first read. ``os.environ`` is read nowhere else.
Values are read at access (``envs.VLLM_API_KEY``), so a test may set them at any time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.exceptions import ConfigError

if TYPE_CHECKING:
    VLLM_API_KEY: str | None
    VLLM_CACHE_ROOT: Path
    VLLM_LOGGING_LEVEL: str
    VLLM_KEEP_ALIVE_ON_ENGINE_DEATH: bool
    VLLM_HTTP_TIMEOUT_KEEP_ALIVE: float
    VLLM_AUDIO_FETCH_TIMEOUT: float
    VLLM_NATIVE: bool
    VLLM_CPU_ISA: str | None
    HF_HUB_OFFLINE: bool

__all__ = ["check", "describe", "names"]

_LEVELS = ("debug", "info", "warning", "error", "critical")


def _text(name: str, default: str | None) -> str | None:
    value = os.environ.get(name, "").strip()
    return value or default


def _flag(name: str, *, default: bool = False) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value == "":
        return default
    if value in {"0", "false", "no", "off"}:
        return False
    if value in {"1", "true", "yes", "on"}:
        return True
    raise ConfigError(f"{name}={value!r} is not a switch; use 1 or 0")


def _seconds(name: str, default: float) -> float:
    text = _text(name, None)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not a number of seconds") from None
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name}={text!r} must be more than 0 seconds")
    return value


def _level() -> str:
    level = (_text("VLLM_LOGGING_LEVEL", "info") or "info").lower()
    if level not in _LEVELS:
        raise ConfigError(f"VLLM_LOGGING_LEVEL={level!r} is none of {', '.join(_LEVELS)}")
    return level


def _cache_root() -> Path:
    base = _text("VLLM_CACHE_ROOT", None)
    if base is not None:
        return Path(base).expanduser()
    xdg = _text("XDG_CACHE_HOME", None)
    return (Path(xdg) if xdg else Path.home() / ".cache") / "higgs-audio-vllm"


# name -> (reader, meaning)
_VARIABLES: dict[str, tuple[Callable[[], Any], str]] = {
    "VLLM_API_KEY": (
        lambda: _text("VLLM_API_KEY", None),
        "key that clients must send when --api-key is not given",
    ),
    "VLLM_CACHE_ROOT": (
        _cache_root,
        "folder for encoded clips, uploaded voices and the random model; default ~/.cache/higgs-audio-vllm",
    ),
    "VLLM_LOGGING_LEVEL": (_level, "debug, info, warning, error or critical; default info"),
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": (
        lambda: _flag("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"),
        "keep the HTTP process running (answering 503) when the engine process is gone",
    ),
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": (
        # Longer than clients and proxies keep idle connections: who sends on one while it is closed
        # here sees it reset, and httpx, for one, keeps them for 5 s.
        lambda: _seconds("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", 75.0),
        "seconds that an idle connection is kept open; default 75",
    ),
    "VLLM_AUDIO_FETCH_TIMEOUT": (
        lambda: _seconds("VLLM_AUDIO_FETCH_TIMEOUT", 10.0),
        "seconds to wait for a reference clip given by URL; default 10",
    ),
    "VLLM_NATIVE": (
        lambda: _flag("VLLM_NATIVE", default=True),
        "use the native CPU library when it is there; 0 computes with torch alone",
    ),
    "VLLM_CPU_ISA": (
        lambda: _text("VLLM_CPU_ISA", None),
        "instruction set of the native library: baseline, avx2 or avx512 (neon on Arm); default the best",
    ),
    "HF_HUB_OFFLINE": (
        lambda: _flag("HF_HUB_OFFLINE"),
        "never ask the Hub; use what its local cache holds",
    ),
}


def __getattr__(name: str) -> Any:
    try:
        reader, _ = _VARIABLES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no variable {name!r}") from None
    return reader()


def check() -> None:
    """Read every variable, so that a wrong one is told before anything is started.

    Raises:
        ConfigError: a value does not parse; the message names the variable.
    """
    for reader, _ in _VARIABLES.values():
        reader()


def names() -> tuple[str, ...]:
    """Names of all variables."""
    return tuple(_VARIABLES)


def describe(name: str) -> str:
    """Meaning of one variable, in one line."""
    return _VARIABLES[name][1]
