"""How far a model with rounded weights is from the exact one, frame by frame.

The exact model speaks, and the other hears the same frames before each of its own (teacher
forcing), so that a difference is the frame's own and not that of what came before it. Knows no
engine: a plain loop over one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm.forward_context import set_forward_context
from vllm.kernels.attention import DecodeMetadata, PrefillMetadata, PrefillSequence
from vllm.kernels.cache import allocate_kv_caches, clear_blocks
from vllm.model_executor.models.interface import SpeechModel

__all__ = ["Divergence", "measure_divergence"]

_BLOCK_SIZE = 16
_TEMPERATURE = 1.0


@dataclass(frozen=True)
class Divergence:
    """Figures over all frames and codebooks."""

    num_frames: int
    kl_mean: float  # nats, of the rounded model's distributions from the exact ones
    kl_max: float
    top1_agreement: float  # share of codes whose most probable value is the same
    sample_agreement: float  # share of codes that the same noise draws
    logit_error: float  # ||rounded - exact|| / ||exact||, each codebook's mean taken out

    def text(self) -> str:
        """One line for people."""
        return (
            f"{self.num_frames} frames under teacher forcing: logits off by "
            f"{100 * self.logit_error:.2g} %, KL {self.kl_mean:.2g} nats (at most "
            f"{self.kl_max:.2g}), same best code {100 * self.top1_agreement:.1f} %, same code "
            f"from the same noise {100 * self.sample_agreement:.1f} %"
        )


@torch.inference_mode()
def measure_divergence(
    exact: SpeechModel,
    rounded: SpeechModel,
    text_ids: Tensor,
    *,
    num_frames: int,
    seed: int = 0,
) -> Divergence:
    """Let ``exact`` speak ``num_frames`` frames after a prompt, and compare.

    Args:
        exact, rounded: two models of one architecture on one device.
        text_ids: int64 [N], the prompt, on that device.
        num_frames: at least 1; frames are drawn at temperature 1, stream marks left out.
        seed: of the drawing.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher, pupil = (
        _Speaker(model, len(text_ids) + num_frames, text_ids.device) for model in (exact, rounded)
    )
    expected, actual = teacher.read(text_ids), pupil.read(text_ids)
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(num_frames):
        noise = torch.empty_like(expected).exponential_(generator=generator).log_().neg_()
        columns.append((expected, actual, noise))
        codes = (expected / _TEMPERATURE + noise).argmax(-1)
        expected, actual = teacher.hear(codes), pupil.hear(codes)
    return _figures(*(torch.stack(column) for column in zip(*columns, strict=True)))


class _Speaker:
    """One model with a cache of its own, which takes one sequence."""

    def __init__(self, model: SpeechModel, max_positions: int, device: torch.device) -> None:
        spec = model.spec
        num_blocks = -(-max_positions // _BLOCK_SIZE)
        self._model = model
        self._device = device
        self._caches = allocate_kv_caches(
            spec.num_layers,
            num_blocks,
            _BLOCK_SIZE,
            spec.num_kv_heads,
            spec.head_dim,
            dtype=spec.dtype,
            device=device,
        )
        clear_blocks(self._caches, range(num_blocks))
        self._blocks = torch.arange(num_blocks, device=device)
        self._length = 0

    def read(self, text_ids: Tensor) -> Tensor:
        """Logits [num_codebooks, codes] after a prompt."""
        num_rows = len(text_ids)
        rows = torch.arange(num_rows, device=self._device)
        sequence = PrefillSequence(rows, self._blocks, start=0, length=num_rows)
        metadata = PrefillMetadata.build([sequence], _BLOCK_SIZE)
        with set_forward_context(metadata, self._caches):
            hidden = self._model.forward(self._model.embed_text(text_ids), rows, num_rows)
        self._length = num_rows
        return self._codes(hidden[-1:])

    def hear(self, codes: Tensor) -> Tensor:
        """Logits [num_codebooks, codes] after one more frame, int64 [num_codebooks]."""
        position = torch.tensor([self._length], device=self._device)
        self._length += 1
        metadata = DecodeMetadata.build(self._blocks[None], [self._length], _BLOCK_SIZE)
        with set_forward_context(metadata, self._caches):
            embedded = self._model.embed_codes(codes[None].to(self._device))
            hidden = self._model.forward(embedded, position, 0)
        return self._codes(hidden)

    def _codes(self, hidden: Tensor) -> Tensor:
        """Logits of the codes alone, on the CPU: the stream's BOS and EOS are the last two."""
        spec = self._model.spec
        marks = [spec.stream_bos_id, spec.stream_eos_id]
        logits = self._model.audio_logits(hidden)[0].cpu()
        return logits.index_fill(-1, torch.tensor(marks), -1e4)


def _figures(expected: Tensor, actual: Tensor, noise: Tensor) -> Divergence:
    """From logits and noise [num_frames, num_codebooks, codebook_size]."""
    log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    is_code = expected > -1e4
    codes = expected[is_code].view(*expected.shape[:2], -1)
    off = actual[is_code].view_as(codes) - codes
    centred = codes - codes.mean(-1, keepdim=True)
    drawn = [(logits / _TEMPERATURE + noise).argmax(-1) for logits in (expected, actual)]
    return Divergence(
        num_frames=len(expected),
        kl_mean=divergence.mean().item(),
        kl_max=divergence.max().item(),
        top1_agreement=(expected.argmax(-1) == actual.argmax(-1)).float().mean().item(),
        sample_agreement=(drawn[0] == drawn[1]).float().mean().item(),
        logit_error=((off - off.mean(-1, keepdim=True)).norm() / centred.norm()).item(),
    )
