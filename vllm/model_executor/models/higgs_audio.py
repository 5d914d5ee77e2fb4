"""Higgs Audio v2: a decoder whose layers keep one feed-forward block for text, one for audio.

Attention weights and the KV cache are shared by both kinds of position. Knows both key layouts of
the checkpoints; knows no sampling, delay pattern or request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vllm.checkpoint_config import CheckpointLayout, HiggsAudioConfig
from vllm.exceptions import CheckpointError
from vllm.forward_context import get_forward_context
from vllm.kernels.attention import AttentionPlan, plan_attention
from vllm.kernels.decode_step import DecoderLayer, DecoderWeights
from vllm.kernels.fused_prefill import FusedPrefill
from vllm.kernels.fused_step import FusedLayer, FusedWeights, can_fuse
from vllm.kernels.linear import DEFAULT_ROW_QUANTUM, pad_rows
from vllm.kernels.quantize import WeightFormat, head_format
from vllm.model_executor.layers import (
    CodebookEmbedding,
    Embedding,
    FeedForward,
    Layer,
    Linear,
    RMSNorm,
    RotaryTable,
    SelfAttention,
)
from vllm.model_executor.models.interface import ModelSpec
from vllm.model_executor.weights import dequantized, iter_tensors, load_strict
from vllm.platforms import activation_dtype

__all__ = [
    "HiggsAudioModel",
    "boson_tensor_name",
    "canonical_tensor_name",
    "detect_key_layout",
    "join_split_tensors",
]

_TEXT_HEAD = "text_lm_head.weight"
_PREFILL_ROWS = 1024  # that fused prefill steps are made for, or a multiple
_HEADS = ("audio_head", "text_head")
_BOSON_HEADS = "audio_decoder_proj."
_BOSON_AUDIO_EMBEDDING = "audio_codebook_embeddings.weight"
_AUDIO_EMBEDDING = "model.embed_audio_tokens.embed_audio_tokens.weight"
_BODY_PREFIXES = ("embed_tokens.", "layers.", "norm.")
_IGNORED_PREFIXES = ("audio_tower.", "audio_encoder_proj.")
_IGNORED_SUFFIXES = (
    "rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
    "audio_codebook_weights",
    "audio_tokens_offsets",
)
# Training checkpoints may hold a tensor as two halves along its rows: half -> (whole, place).
_SPLIT_TENSORS = {
    "embed_tokens.embedding_": "embed_tokens.weight",
    "audio_lm_head.linear_": "audio_lm_head.weight",
    "text_lm_head.linear_": "text_lm_head.weight",
}


class HiggsAudioModel(nn.Module):
    """The network of both published layouts; see ``interface.SpeechModel`` for the methods."""

    def __init__(
        self,
        config: HiggsAudioConfig,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        with_text_head: bool = False,
    ) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        # Of what has this type, nothing is large: norms, angles, and the table of codes.
        activations = activation_dtype(dtype, torch.get_default_device())
        self.config = config
        self.spec = _spec(config, dtype, activations, max_model_len)
        self._row_quantum = DEFAULT_ROW_QUANTUM
        # Made by the first prefill that wants it, by the rows that it takes. None is ever given up:
        # recorded steps hold its memory.
        self._fused_prefills: dict[int, FusedPrefill] = {}
        self.text_embedding = Embedding(config.vocab_size, hidden_size, dtype)
        self.audio_embedding = CodebookEmbedding(
            config.num_codebooks, config.codebook_size, hidden_size, activations
        )
        self.layers = nn.ModuleList(
            _DualLayer(config, dtype, activations) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(hidden_size, config.rms_norm_eps, activations)
        self.audio_head = Linear(hidden_size, config.num_codebooks * config.codebook_size, dtype)
        self.text_head = Linear(hidden_size, config.vocab_size, dtype) if with_text_head else None
        self.rotary = RotaryTable(
            config.head_dim, max_model_len, config.rope_theta, config.rope_scaling, activations
        )

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
        with_text_head: bool,
        quantization: WeightFormat | None,
    ) -> HiggsAudioModel:
        config = HiggsAudioConfig.from_folder(folder)
        with torch.device(device):
            model = cls(
                config, dtype=dtype, max_model_len=max_model_len, with_text_head=with_text_head
            )
        model.load(dequantized(iter_tensors(folder)), source=str(folder), quantization=quantization)
        return model.eval()

    def load(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        source: str,
        quantization: WeightFormat | None = None,
    ) -> None:
        """Fill the weights from tensors in either key layout; raises CheckpointError.

        Each matrix is packed as soon as it is whole, so that memory never holds all of them in the
        wider form that they are loaded in.
        """
        targets = self.targets()
        matrices = {_address(each.weight): (name, each) for name, each in self._named_linears()}
        addresses = {name: _address(target) for name, target in targets.items()}
        parts = Counter(addresses.values())

        def rename(name: str) -> str | None:
            canonical = canonical_tensor_name(name)
            return None if canonical == _TEXT_HEAD and self.text_head is None else canonical

        def pack_when_whole(name: str) -> None:
            address = addresses[name]
            parts[address] -= 1
            if parts[address] == 0 and address in matrices:
                _pack(*matrices[address], quantization)

        load_strict(
            targets,
            join_split_tensors(tensors),
            source=source,
            rename=rename,
            on_filled=pack_when_whole,
        )

    def pack(self, quantization: WeightFormat | None = None) -> None:
        """Bring weights that were not loaded but made into the form that is fastest here."""
        for name, matrix in self._named_linears():
            _pack(name, matrix, quantization)

    def targets(self) -> dict[str, Tensor]:
        """Transformers name of each tensor -> the weight, or the view of one, that it fills."""
        targets = self.text_embedding.targets("model.embed_tokens")
        targets |= self.audio_embedding.targets("model.embed_audio_tokens.embed_audio_tokens")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, _DualLayer)
            targets |= layer.targets(f"model.layers.{index}")
        targets |= self.norm.targets("model.norm")
        targets |= self.audio_head.targets("audio_lm_head")
        if self.text_head is not None:
            targets |= self.text_head.targets("text_lm_head")
        return targets

    def embed_text(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.text_embedding(ids)
        return embedded.to(self.spec.activation_dtype)

    def embed_codes(self, codes: Tensor) -> Tensor:
        embedded: Tensor = self.audio_embedding(codes)
        return embedded

    def forward(self, hidden: Tensor, positions: Tensor, num_text_rows: int) -> Tensor:
        num_rows = hidden.shape[0]
        step = self._prepare(hidden, positions, num_text_rows)
        hidden = step.hidden
        for layer, cache in zip(self.layers, step.caches, strict=True):
            hidden = layer(hidden, step.rotary, cache, step.plan, step.num_text_rows)
        normed: Tensor = self.norm(hidden)
        return normed[:num_rows]

    def fill_cache(self, hidden: Tensor, positions: Tensor, num_text_rows: int) -> None:
        spec = self.spec
        if can_fuse(hidden.device, hidden_size=spec.hidden_size, head_dim=spec.head_dim):
            self._fill_cache_fused(hidden, num_text_rows)
            return
        step = self._prepare(hidden, positions, num_text_rows)
        hidden = step.hidden
        for layer, cache in zip(self.layers[:-1], step.caches[:-1], strict=True):
            hidden = layer(hidden, step.rotary, cache, step.plan, step.num_text_rows)
        last = self.layers[-1]
        assert isinstance(last, _DualLayer)
        last.store(hidden, step.rotary, step.caches[-1], step.plan, step.num_text_rows)

    def _fill_cache_fused(self, hidden: Tensor, num_text_rows: int) -> None:
        context = get_forward_context()
        plan = plan_attention(context.attn_metadata, context.kv_caches[0])
        assert plan.fused is not None, "kernels attend wherever they multiply"
        num_rows = len(hidden)
        max_rows = -(-num_rows // _PREFILL_ROWS) * _PREFILL_ROWS
        if max_rows not in self._fused_prefills:
            self._fused_prefills[max_rows] = self.fused_prefill(max_rows)
        counts = (num_text_rows, num_rows - num_text_rows)
        self._fused_prefills[max_rows](hidden, counts, plan.fused, context.kv_caches)

    def fused_prefill(self, max_rows: int) -> FusedPrefill:
        """``fill_cache`` in few launches, for steps of so many rows; only where ``can_fuse``."""
        kinds = [self._fused_weights(of_text=of_text) for of_text in (True, False)]
        is_invariant = self._row_quantum > 1
        return FusedPrefill(kinds, max_rows=max_rows, batch_invariant=is_invariant)

    def _prepare(self, hidden: Tensor, positions: Tensor, num_text_rows: int) -> _Step:
        context = get_forward_context()
        plan = plan_attention(context.attn_metadata, context.kv_caches[0])
        num_rows = hidden.shape[0]
        # Padding once here spares every product below its own.
        hidden = pad_rows(hidden, self._row_quantum)
        num_padding = hidden.shape[0] - num_rows
        if num_padding:
            positions = torch.cat([positions, positions.new_zeros(num_padding)])
        if num_text_rows == num_rows:
            num_text_rows += num_padding
        rotary = self.rotary(positions) if plan.fused is None else self.rotary.tables
        return _Step(hidden, rotary, num_text_rows, plan, context.kv_caches)

    def audio_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.audio_head(hidden)
        return logits.float().view(-1, self.spec.num_codebooks, self.spec.codebook_size)

    def text_logits(self, hidden: Tensor) -> Tensor:
        if self.text_head is None:
            raise RuntimeError("the model was loaded without its text head")
        logits: Tensor = self.text_head(hidden)
        return logits.float()

    def decoder_weights(self) -> DecoderWeights:
        layers = [layer for layer in self.layers if isinstance(layer, _DualLayer)]
        return DecoderWeights(
            embedding=self.audio_embedding.weight,
            layers=tuple(layer.decoder_layer() for layer in layers),
            norm=self.norm.weight,
            head=self.audio_head.native_matrix(),
            cos=self.rotary.cos,
            signed_sin=self.rotary.signed_sin,
            num_heads=self.config.num_attention_heads,
            norm_eps=self.config.rms_norm_eps,
            codebook_size=self.config.codebook_size,
        )

    def fused_weights(self) -> FusedWeights:
        return self._fused_weights(of_text=False)

    def _fused_weights(self, *, of_text: bool) -> FusedWeights:
        layers = [layer for layer in self.layers if isinstance(layer, _DualLayer)]
        return FusedWeights(
            embedding=self.audio_embedding.weight,
            layers=tuple(layer.fused_layer(of_text=of_text) for layer in layers),
            norm=self.norm.weight,
            head=self.audio_head.skinny_weight(),
            cos=self.rotary.cos,
            signed_sin=self.rotary.signed_sin,
            num_heads=self.config.num_attention_heads,
            norm_eps=self.config.rms_norm_eps,
        )

    def matrices(self) -> Iterator[Tensor]:
        return (matrix.weight for matrix in self._linears() if matrix.uses_torch)

    @property
    def largest_matrix(self) -> int:
        return max(prod(matrix.shape) for matrix in self._linears())

    def set_row_quantum(self, quantum: int) -> None:
        self._fused_prefills.clear()
        self._row_quantum = quantum
        for matrix in self._linears():
            matrix.row_quantum = quantum

    def _linears(self) -> Iterator[Linear]:
        return (matrix for _, matrix in self._named_linears())

    def _named_linears(self) -> Iterator[tuple[str, Linear]]:
        return ((name, each) for name, each in self.named_modules() if isinstance(each, Linear))


def _address(tensor: Tensor) -> int:
    """Tells weights apart; views of one weight have its own."""
    return tensor.untyped_storage().data_ptr()


def _pack(name: str, matrix: Linear, quantization: WeightFormat | None) -> None:
    """Pack one matrix.

    Heads of an int4 model are int8: they are small, and an error there is not averaged out.
    """
    try:
        matrix.pack(head_format(quantization) if name in _HEADS else quantization)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be quantised: {error}") from error


class _Step(NamedTuple):
    """What all layers share in one step."""

    hidden: Tensor  # [N + padding, hidden_size], input of the first layer
    rotary: tuple[Tensor, Tensor]  # as ``SelfAttention.store`` takes them
    num_text_rows: int
    plan: AttentionPlan
    caches: Sequence[Tensor]


class _DualLayer(Layer):
    """One decoder layer: shared attention, and norms and feed-forward for text and for audio."""

    def __init__(
        self, config: HiggsAudioConfig, dtype: torch.dtype, activations: torch.dtype
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.attention = SelfAttention(
            size, config.num_attention_heads, config.num_key_value_heads, config.head_dim, dtype
        )
        self.text_input_norm = RMSNorm(size, eps, activations)
        self.text_post_norm = RMSNorm(size, eps, activations)
        self.text_ffn = FeedForward(size, config.intermediate_size, dtype)
        self.audio_input_norm = RMSNorm(size, eps, activations)
        self.audio_post_norm = RMSNorm(size, eps, activations)
        self.audio_ffn = FeedForward(size, config.intermediate_size, dtype)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: Tensor,
        plan: AttentionPlan,
        num_text_rows: int,
    ) -> Tensor:
        x = x + self.attention(self._normed(x, num_text_rows), rotary, cache, plan)
        return x.add_(self._fed_forward(x, num_text_rows))

    def store(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: Tensor,
        plan: AttentionPlan,
        num_text_rows: int,
    ) -> None:
        """The part of ``forward`` that later steps need: keys and values."""
        self.attention.store(self._normed(x, num_text_rows), rotary, cache, plan)

    def decoder_layer(self) -> DecoderLayer:
        """The layer as audio positions see it, for native steps."""
        return DecoderLayer(
            input_norm=self.audio_input_norm.weight,
            qkv=self.attention.qkv.native_matrix(),
            output=self.attention.output.native_matrix(),
            post_norm=self.audio_post_norm.weight,
            gate_up=self.audio_ffn.gate_up.native_matrix(),
            down=self.audio_ffn.down.native_matrix(),
        )

    def fused_layer(self, *, of_text: bool) -> FusedLayer:
        """The layer as one kind of row sees it, for steps that a device takes.

        Packed weights are contiguous there already.
        """
        ffn = self.text_ffn if of_text else self.audio_ffn
        return FusedLayer(
            input_norm=(self.text_input_norm if of_text else self.audio_input_norm).weight,
            qkv=self.attention.qkv.skinny_weight(),
            output=self.attention.output.skinny_weight(),
            post_norm=(self.text_post_norm if of_text else self.audio_post_norm).weight,
            gate_up=ffn.gate_up.skinny_weight(),
            down=ffn.down.skinny_weight(),
        )

    def _normed(self, x: Tensor, num_text_rows: int) -> Tensor:
        if num_text_rows == 0:
            normed: Tensor = self.audio_input_norm(x)
        elif num_text_rows == x.shape[0]:
            normed = self.text_input_norm(x)
        else:
            text, audio = x[:num_text_rows], x[num_text_rows:]
            normed = torch.cat([self.text_input_norm(text), self.audio_input_norm(audio)])
        return normed

    def _fed_forward(self, x: Tensor, num_text_rows: int) -> Tensor:
        if num_text_rows == 0:
            fed: Tensor = self.audio_ffn(self.audio_post_norm(x))
        elif num_text_rows == x.shape[0]:
            fed = self.text_ffn(self.text_post_norm(x))
        else:
            text = self.text_ffn(self.text_post_norm(x[:num_text_rows]))
            audio = self.audio_ffn(self.audio_post_norm(x[num_text_rows:]))
            fed = torch.cat([text, audio])
        return fed

    def targets(self, prefix: str) -> dict[str, Tensor]:
        return (
            self.attention.targets(f"{prefix}.self_attn")
            | self.text_ffn.targets(f"{prefix}.mlp")
            | self.audio_ffn.targets(f"{prefix}.audio_mlp")
            | self.text_input_norm.targets(f"{prefix}.input_layernorm")
            | self.text_post_norm.targets(f"{prefix}.post_attention_layernorm")
            | self.audio_input_norm.targets(f"{prefix}.audio_input_layernorm")
            | self.audio_post_norm.targets(f"{prefix}.audio_post_attention_layernorm")
        )


def detect_key_layout(names: Iterable[str]) -> CheckpointLayout:
    """Which key layout a checkpoint's tensors are in, whatever its configuration says."""
    for name in names:
        if name.startswith((_BOSON_AUDIO_EMBEDDING, _BOSON_HEADS)):
            return "boson"
        if name.startswith("model.embed_audio_tokens."):
            return "transformers"
    raise CheckpointError("the tensors are those of no Higgs Audio v2 model in either layout")


def canonical_tensor_name(name: str) -> str | None:
    """Transformers name of a tensor in either layout; None for one that is not used."""
    if name.endswith(_IGNORED_SUFFIXES) or name.startswith(_IGNORED_PREFIXES):
        return None
    if name == _BOSON_AUDIO_EMBEDDING:
        return _AUDIO_EMBEDDING
    if name.startswith(_BODY_PREFIXES):
        return f"model.{name}"
    return name.removeprefix(_BOSON_HEADS)


def boson_tensor_name(name: str) -> str:
    """Original name of the tensor that the transformers layout calls ``name``."""
    if name == _AUDIO_EMBEDDING:
        return _BOSON_AUDIO_EMBEDDING
    if name.endswith("_lm_head.weight"):
        return f"{_BOSON_HEADS}{name}"
    return name.removeprefix("model.")


def join_split_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Put the frozen and trainable halves of training checkpoints together, frozen rows first.

    A half whose other half never comes is passed on under its own name.
    """
    waiting: dict[str, tuple[str, str, Tensor]] = {}  # whole name -> half, its name, its rows
    for name, tensor in tensors:
        split = _split_tensor(name)
        if split is None:
            yield name, tensor
            continue
        whole, half = split
        if whole not in waiting:
            waiting[whole] = (half, name, tensor)
            continue
        other_half, _, other = waiting.pop(whole)
        halves = {half: tensor, other_half: other}
        yield whole, torch.cat([halves["frozen"], halves["trainable"]])
    for _, name, tensor in waiting.values():
        yield name, tensor


def _split_tensor(name: str) -> tuple[str, str] | None:
    for stem, whole in _SPLIT_TENSORS.items():
        head, found, tail = name.partition(stem)
        half = tail.removesuffix(".weight")
        if found and half in ("frozen", "trainable"):
            return head + whole, half
    return None


def _spec(
    config: HiggsAudioConfig, dtype: torch.dtype, activations: torch.dtype, max_model_len: int
) -> ModelSpec:
    return ModelSpec(
        architecture=config.architecture,
        layout=config.layout,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        num_codebooks=config.num_codebooks,
        codebook_size=config.codebook_size,
        stream_bos_id=config.stream_bos_id,
        stream_eos_id=config.stream_eos_id,
        dtype=dtype,
        activation_dtype=activations,
        max_model_len=max_model_len,
    )
