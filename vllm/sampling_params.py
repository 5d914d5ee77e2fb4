"""How one request is sampled: temperature, filters, seed, RAS and limits.

Checked where it is made, so that the engine only ever sees values it can use. Knows nothing of
prompts, and a request body is turned into one of these by ``entrypoints.openai.protocol``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vllm.exceptions import InvalidRequestError

__all__ = [
    "MAX_RAS_WINDOW",
    "EosRule",
    "RasMode",
    "SamplingParams",
]

MAX_RAS_WINDOW = 64
_MAX_SEED = 2**64 - 1

EosRule = Literal["strict", "reference"]
RasMode = Literal["redraw", "block"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling of one request; the defaults are those of Higgs Audio v2's own examples.

    Args:
        temperature: divides the logits; 0 takes the most likely code (and then seed 0 if none
            is given, so that the result repeats).
        top_p: smallest set of codes whose probability reaches this; (0, 1].
        top_k: number of most likely codes kept; -1 or 0 keeps all.
        seed: 0 … 2**64 - 1; the same seed gives the same codes in any batch. None draws one.
        ras_window_length: frames that repetition aware sampling looks back; 0 switches it off.
        ras_max_num_repeat: occurrences in the window from which a code is redrawn; 0 switches
            it off. Rule: Higgs Audio v2 reference, ``ras_win_len`` and ``ras_win_max_num_repeat``.
        ras_mode: ``"redraw"`` is the reference rule; ``"block"`` masks such codes before the draw.
        max_tokens: delayed frames, BOS frame and ramp included; None leaves it to the guards.
        stop: text stop strings; accepted for compatibility, since generated audio holds no text.
        eos_rule: ``"strict"`` lets only the first codebook end the utterance; ``"reference"``
            masks as transformers does, for parity.
        max_audio_s: ceiling on audio seconds; None takes the server's.
        max_silence_s: seconds of silence after which the output is cut; None takes the server's.

    Raises:
        InvalidRequestError: a value is out of range; ``param`` names the field.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 50
    seed: int | None = None
    ras_window_length: int = 7
    ras_max_num_repeat: int = 2
    ras_mode: RasMode = "redraw"
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    eos_rule: EosRule = "strict"
    max_audio_s: float | None = None
    max_silence_s: float | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, low=0.0, high=100.0)
        _check_number("top_p", self.top_p, low=0.0, high=1.0, low_open=True)
        _check_int("top_k", self.top_k, low=-1, high=2**31 - 1)
        if self.seed is not None:
            _check_int("seed", self.seed, low=0, high=_MAX_SEED)
        _check_int("ras_window_length", self.ras_window_length, low=0, high=MAX_RAS_WINDOW)
        _check_int("ras_max_num_repeat", self.ras_max_num_repeat, low=0, high=2**31 - 1)
        _check_choice("ras_mode", self.ras_mode, ("redraw", "block"))
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, low=1, high=2**31 - 1)
        _check_choice("eos_rule", self.eos_rule, ("strict", "reference"))
        for name in ("max_audio_s", "max_silence_s"):
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value, low=0.0, high=math.inf, low_open=True)

    @property
    def uses_ras(self) -> bool:
        return self.ras_window_length > 0 and self.ras_max_num_repeat > 0

    @property
    def ras_params(self) -> tuple[int, int]:
        """``(window, repeats)``; ``(0, 0)`` when switched off."""
        return (self.ras_window_length, self.ras_max_num_repeat) if self.uses_ras else (0, 0)


def _check_number(
    name: str, value: float, *, low: float, high: float, low_open: bool = False
) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    below = is_number and (value <= low if low_open else value < low)
    if not is_number or math.isnan(value) or below or value > high:
        opening = "(" if low_open else "["
        raise InvalidRequestError(
            f"{name}={value!r} is not allowed; give a number in {opening}{low:g}, {high:g}]",
            param=name,
        )


def _check_int(name: str, value: int, *, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequestError(
            f"{name}={value!r} is not allowed; give a whole number from {low} to {high}", param=name
        )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidRequestError(
            f"{name}={value!r} is not allowed; give one of {', '.join(allowed)}", param=name
        )
