"""Logits of all codebooks of all rows to codes, in one vectorised pass.

A list of verbs in the order that the reference applies them. Holds no state: what a row may emit
and what it emitted belong to ``CodebookState``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm.kernels.philox import Purpose, uniform
from vllm.model_executor.framing import DelayPattern
from vllm.model_executor.heads import CodebookState, NextFrame
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops import (
    apply_ras_penalty,
    apply_temperature,
    apply_top_k_top_p,
    draw,
    redraw_repeated,
)

__all__ = ["Sampler"]


class Sampler:
    """Draws one frame per row; a row's result does not depend on the rows beside it."""

    def __init__(self, pattern: DelayPattern) -> None:
        self._pattern = pattern

    def next_frames(
        self, logits: Tensor, rows: Tensor, metadata: SamplingMetadata, state: CodebookState
    ) -> Tensor:
        """As a call, with what ``rows`` may emit and have emitted taken from their ``state``."""
        width = metadata.history_width
        history = state.recent(rows, width) if width else None
        return self(logits, metadata, state.next_frame(rows), history)

    def __call__(
        self,
        logits: Tensor,
        metadata: SamplingMetadata,
        next_frame: NextFrame,
        history: Tensor | None = None,
    ) -> Tensor:
        """Choose the codes of the next frame.

        Args:
            logits: float32 [num_rows, num_codebooks, vocab_size], overwritten.
            metadata: settings of the rows.
            next_frame: what the rows may emit.
            history: int16 [num_rows, metadata.history_width or more, num_codebooks], codes of
                past frames, newest first; None where ``metadata.history_width`` is 0.

        Returns:
            int64 [num_rows, num_codebooks], what ``next_frame`` dictates included.
        """
        self._mask_markers(logits, next_frame)
        noise = self._noise(metadata, next_frame)
        penalised = apply_ras_penalty(logits, history, metadata.ras_block)
        codes = self._choose(penalised, metadata, noise.get(Purpose.DRAW))
        if metadata.ras_redraw is not None and history is not None:
            # NOTE: from the logits before the penalty and the temperature. Masked ones equal the
            # raw ones wherever a redraw can happen under the reference rule.
            redraw_noise = noise[Purpose.RAS_REDRAW]
            codes = redraw_repeated(codes, logits, redraw_noise, history, metadata.ras_redraw)
        return torch.where(next_frame.forced >= 0, next_frame.forced, codes)

    def _mask_markers(self, logits: Tensor, next_frame: NextFrame) -> None:
        """Rule out BOS and EOS where they may not appear."""
        logits[..., self._pattern.bos].masked_fill_(~next_frame.allow_bos, -math.inf)
        logits[..., self._pattern.eos].masked_fill_(~next_frame.allow_eos, -math.inf)

    def _noise(self, metadata: SamplingMetadata, next_frame: NextFrame) -> dict[Purpose, Tensor]:
        """Uniform numbers [num_rows, num_codebooks] for what will be drawn, and for no more."""
        purposes = []
        if not metadata.temperature.all_greedy:
            purposes.append(Purpose.DRAW)
        if metadata.ras_redraw is not None:
            purposes.append(Purpose.RAS_REDRAW)
        if not purposes:
            return {}
        numbers = uniform(
            metadata.seed, next_frame.index, self._pattern.num_codebooks, tuple(purposes)
        )
        return dict(zip(purposes, numbers, strict=True))

    def _choose(self, logits: Tensor, metadata: SamplingMetadata, noise: Tensor | None) -> Tensor:
        """First draw of each codebook, int64 [num_rows, num_codebooks]."""
        temperature = metadata.temperature
        if temperature.all_greedy:
            return logits.argmax(-1)
        assert noise is not None, "drawn for every row that is not greedy"
        probs = apply_temperature(logits, temperature).softmax(-1)
        codes = draw(apply_top_k_top_p(probs, metadata.filters), noise)
        if temperature.is_greedy is None:
            return codes
        return torch.where(temperature.is_greedy, logits.argmax(-1), codes)
