"""Between what a model emits and what its codec eats: the delay pattern of codebook models.

Pure numpy functions over whole utterances or increments; knows neither how codes are drawn nor
what they sound like.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["DelayFraming", "DelayPattern"]


@dataclass(frozen=True)
class DelayPattern:
    """Codebook k lags k frames behind codebook 0; a BOS and an EOS column close the utterance.

    Three codebooks, three frames of codes, B = BOS and E = EOS::

        delayed frame   0    1    2    3    4    5    6
        codebook 0      B   11   12   13    E    E    E
        codebook 1      B    B   21   22   23    E    E
        codebook 2      B    B    B   31   32   33    E

    Attributes:
        num_codebooks: K.
        bos: code that fills a codebook before its turn.
        eos: code that fills a codebook after its end; codes below both are sound.
    """

    num_codebooks: int
    bos: int
    eos: int

    @property
    def max_code(self) -> int:
        """Largest code that is sound."""
        return min(self.bos, self.eos) - 1

    def num_positions(self, num_frames: int) -> int:
        """Delayed frames of an utterance of ``num_frames`` codec frames, BOS and EOS included."""
        return num_frames + self.num_codebooks + 1

    def num_frames(self, num_positions: int, *, ended: bool) -> int:
        """Codec frames that ``num_positions`` delayed frames complete.

        Args:
            num_positions: delayed frames so far, the BOS frame included.
            ended: the last delayed frame is the EOS frame, which completes no codes.
        """
        return max(0, num_positions - self.num_codebooks - ended)

    def apply(self, codes: NDArray[np.integer]) -> NDArray[np.int16]:
        """Codes [num_codebooks, T] -> delayed frames [T + num_codebooks + 1, num_codebooks]."""
        num_frames = codes.shape[1]
        delayed = np.full((self.num_positions(num_frames), self.num_codebooks), self.bos, np.int16)
        for k in range(self.num_codebooks):
            delayed[k + 1 : k + 1 + num_frames, k] = codes[k]
            delayed[k + 1 + num_frames :, k] = self.eos
        return delayed

    def undo(self, delayed: NDArray[np.integer], *, ended: bool) -> NDArray[np.int16]:
        """Delayed frames [N, num_codebooks], BOS frame first -> codes [num_codebooks, T].

        Stray BOS and EOS codes inside are clipped to the largest code, as the reference does.

        Args:
            delayed: frames as generated.
            ended: the last one is the EOS frame; else the output was cut and all codes are kept.
        """
        num_frames = self.num_frames(len(delayed), ended=ended)
        return self._read(delayed, first=1, num_frames=num_frames)

    def _read(
        self, delayed: NDArray[np.integer], *, first: int, num_frames: int
    ) -> NDArray[np.int16]:
        """Codes of ``num_frames`` columns, codebook 0 starting at delayed frame ``first``."""
        codes = np.empty((self.num_codebooks, num_frames), np.int16)
        for k in range(self.num_codebooks):
            codes[k] = delayed[first + k : first + k + num_frames, k]
        return codes.clip(max=self.max_code)


class DelayFraming:
    """Undoes the delay of one utterance as its frames arrive.

    The increments of ``push`` joined along time equal ``DelayPattern.undo`` of all frames.
    """

    def __init__(self, pattern: DelayPattern) -> None:
        self._pattern = pattern
        self._num_pushed = 0
        self._num_emitted = 0
        # Delayed frames that still hold codes to emit, [n, num_codebooks]; the first of them is
        # that of codebook 0's next code once the BOS frame is behind.
        self._pending = np.empty((0, pattern.num_codebooks), np.int16)

    @property
    def num_frames(self) -> int:
        """Codec frames emitted so far."""
        return self._num_emitted

    def push(self, frames: NDArray[np.integer], *, ended: bool = False) -> NDArray[np.int16]:
        """Add delayed frames [n, num_codebooks]; return the codes [num_codebooks, m] they complete.

        Args:
            frames: the next frames; the very first of an utterance is its BOS frame.
            ended: the last of ``frames`` is the EOS frame.
        """
        if self._num_pushed == 0:
            self._num_pushed = min(1, len(frames))
            frames = frames[1:]
        self._num_pushed += len(frames)
        self._pending = np.concatenate([self._pending, frames.astype(np.int16, copy=False)])
        total = self._pattern.num_frames(self._num_pushed, ended=ended)
        num_new = max(0, total - self._num_emitted)
        codes = self._pattern._read(self._pending, first=0, num_frames=num_new)
        self._pending = self._pending[num_new:]
        self._num_emitted += num_new
        return codes
