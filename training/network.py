"""The language model as it is trained: Higgs Audio v2's network over batches of whole prompts.

The weights have the published names, so ``state_dict`` is a checkpoint. Text is right-aligned and
the delayed frames follow it, so that every position is either text or audio for the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Network", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Of the network; names as in the published configuration."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    num_codebooks: int = 8
    codebook_size: int = 1026  # with BOS and EOS


#: (layer, head) whose attention is taught to be at the symbol being spoken, or at the one after it.
CURRENT_HEADS = ((1, 0), (2, 0))
NEXT_HEADS = ((2, 1),)
_SYMBOL_STD = 0.05


class _Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.num_heads = sizes.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(
        self, x: Tensor, first: int, rotary: tuple[Tensor, Tensor], mask: Tensor, num_taught: int
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, T - first, width] and log-attention [B, num_taught, T - first, T].

        Args:
            x: [B, T, width].
            first: place of the first query; the places before it are only looked at.
            rotary: cosines and signed sines [B, 1, T, width / heads].
            mask: float32 [B, 1, T, T], what is added to scores.
            num_taught: of the first heads, those whose log-attention is wanted.
        """
        query, key, value = (
            projection(each).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, each in (
                (self.q_proj, x[:, first:]),
                (self.k_proj, x),
                (self.v_proj, x),
            )
        )
        query = _rotate(query * query.shape[-1] ** -0.5, *(each[:, :, first:] for each in rotary))
        # Written out: PyTorch's fused attention is slow on a CPU when it is masked and bfloat16.
        scores = (query @ _rotate(key, *rotary).transpose(-1, -2)).float() + mask[:, :, first:]
        taught = scores[:, :num_taught].log_softmax(-1) if num_taught else None
        attended = scores.softmax(-1).to(value.dtype) @ value
        return self.o_proj(attended.transpose(1, 2).flatten(2)), taught


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, -1) * signed_sin.to(x.dtype)


class _FeedForward(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.up_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self_attn = _Attention(sizes)
        self.mlp, self.audio_mlp = _FeedForward(sizes), _FeedForward(sizes)
        self.input_layernorm, self.post_attention_layernorm = _norms(sizes)
        self.audio_input_layernorm, self.audio_post_attention_layernorm = _norms(sizes)

    def forward(
        self,
        x: Tensor,
        num_text: int,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor,
        *,
        num_taught: int,
        is_last: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, width] -> the same, or of the last layer [B, T - num_text, width]; log-attention."""
        text, audio = x[:, :num_text], x[:, num_text:]
        normed = torch.cat([self.input_layernorm(text), self.audio_input_layernorm(audio)], 1)
        first = num_text if is_last else 0
        attended, taught = self.self_attn(normed, first, rotary, mask, num_taught)
        x = x[:, first:] + attended
        if is_last:  # nothing is read off the text
            return x + self.audio_mlp(self.audio_post_attention_layernorm(x)), taught
        text, audio = x[:, :num_text], x[:, num_text:]
        fed = [
            self.mlp(self.post_attention_layernorm(text)),
            self.audio_mlp(self.audio_post_attention_layernorm(audio)),
        ]
        return x + torch.cat(fed, 1), taught


def _norms(sizes: Sizes) -> tuple[nn.RMSNorm, nn.RMSNorm]:
    return tuple(nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps) for _ in range(2))


class _CodeEmbedding(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        num_rows = sizes.num_codebooks * sizes.codebook_size
        self.embed_audio_tokens = nn.Embedding(num_rows, sizes.hidden_size)
        offsets = torch.arange(sizes.num_codebooks) * sizes.codebook_size
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """[B, T, 8] -> [B, T, width]."""
        rows = self.embed_audio_tokens(codes + self.offsets)
        return rows.sum(-2)


class _Body(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.embed_audio_tokens = _CodeEmbedding(sizes)
        self.layers = nn.ModuleList(_Layer(sizes) for _ in range(sizes.num_hidden_layers))
        self.norm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)


class Network(nn.Module):
    """Text and delayed frames to hidden states and to logits of every codebook."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.model = _Body(sizes)
        num_logits = sizes.num_codebooks * sizes.codebook_size
        self.audio_lm_head = nn.Linear(sizes.hidden_size, num_logits, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        residual = 0.02 / math.sqrt(2 * self.sizes.num_hidden_layers)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                nn.init.normal_(weight, std=std)

    @torch.no_grad()
    def know_codes(self, codebooks: Tensor, id_of_code: Tensor) -> None:
        """Start with codes that sound alike being alike, and first codes like what they speak.

        Args:
            codebooks: [8, 1024, size], what the codes sound like.
            id_of_code: int64 [1024], the text id whose sound a code of the first codebook is.
        """
        width, size = self.sizes.hidden_size, self.sizes.codebook_size
        symbols = self.model.embed_tokens.weight
        nn.init.normal_(symbols, std=_SYMBOL_STD)
        logits_of_id = torch.randn(len(symbols), width) * 0.02
        for index, book in enumerate(codebooks):
            standard = book / book.std()
            rows = slice(index * size, index * size + len(book))
            inputs = self.model.embed_audio_tokens.embed_audio_tokens.weight[rows]
            outputs = self.audio_lm_head.weight[rows]
            for weight in (inputs, outputs):
                projection = torch.randn(book.shape[1], width) / book.shape[1] ** 0.5
                weight.copy_(0.02 * standard @ projection + 0.005 * torch.randn(weight.shape))
            if index == 0:
                inputs += symbols[id_of_code]
                outputs += logits_of_id[id_of_code]

    def forward(
        self,
        text: Tensor,
        num_padding: Tensor,
        frames: Tensor,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states of the audio positions.

        Args:
            text: int64 [B, Tt], right-aligned.
            num_padding: int64 [B], ids before each text that mean nothing.
            frames: int64 [B, Ta, 8], delayed, the BOS frame first.
            positions: int64 [B, Tt + Ta], places in the prompt, -1 for padding, where a
                reference's frames belong between its text and the other; default: all text, then
                all frames.

        Returns:
            [B, Ta, hidden_size], and the log-attention [B, Ta, Tt] of each taught head in the
            order of ``CURRENT_HEADS`` and ``NEXT_HEADS``.
        """
        num_text, length = text.shape[1], text.shape[1] + frames.shape[1]
        body = self.model
        x = torch.cat([body.embed_tokens(text), body.embed_audio_tokens(frames)], 1)
        if positions is None:
            places = torch.arange(length, device=x.device)
            positions = (places - num_padding[:, None]).clamp(min=-1)
        rotary = self._rotary(positions)
        taught: dict[tuple[int, int], Tensor] = {}
        mask = _causal_mask(positions)
        last = len(body.layers) - 1
        for index, layer in enumerate(body.layers):
            heads = [head for at, head in (*CURRENT_HEADS, *NEXT_HEADS) if at == index]
            num_taught = len(heads) if self.training else 0
            x, attention = layer(
                x, num_text, rotary, mask, num_taught=num_taught, is_last=index == last
            )
            if attention is not None:
                for head in heads:
                    taught[index, head] = attention[:, head, -frames.shape[1] :, :num_text]
        return body.norm(x), list(taught.values())

    def logits(self, hidden: Tensor, first: int, count: int) -> Tensor:
        """float32 logits [N, count, 1026] of some codebooks for hidden states [N, hidden_size]."""
        size = self.sizes.codebook_size
        rows = self.audio_lm_head.weight[first * size : (first + count) * size]
        return F.linear(hidden, rows).float().view(-1, count, size)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        half = self.sizes.hidden_size // self.sizes.num_attention_heads // 2
        exponents = torch.arange(half, device=positions.device) / half
        angles = positions[:, None, :, None].float() * self.sizes.rope_theta**-exponents
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _causal_mask(positions: Tensor) -> Tensor:
    """float32 [B, 1, T, T] to add; padding sees itself, so that no row is empty."""
    causal = positions[:, :, None] >= positions[:, None]
    known = positions >= 0
    itself = torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device)
    seen = (causal & known[:, None]) | itself
    return torch.where(seen, 0.0, -1e9)[:, None]
