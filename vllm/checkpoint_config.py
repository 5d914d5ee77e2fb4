"""What a Higgs Audio v2 ``config.json`` says, in either of its two layouts, as one typed record.

Needs no torch, so the prompt builder and the HTTP process read ids and sizes from here. It never
looks at tensors: their key layout is decided apart from this (``models.higgs_audio``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm.exceptions import CheckpointError

__all__ = ["CheckpointLayout", "HiggsAudioConfig", "RopeScaling", "read_config"]

CheckpointLayout = Literal["boson", "transformers"]

_ARCHITECTURES: dict[CheckpointLayout, str] = {
    "boson": "HiggsAudioModel",
    "transformers": "HiggsAudioV2ForConditionalGeneration",
}

# The published ids. A layout that has no field for one of them takes it from here, if the
# vocabulary reaches that far.
_PUBLISHED_IDS = {
    "bos": 128000,
    "eos": 128001,
    "pad": 128001,
    "audio_eos": 128012,
    "audio_out_bos": 128013,
    "audio_delay": 128014,
    "audio_in": 128015,
    "audio_out": 128016,
}
_NUM_STREAM_MARKS = 2  # BOS and EOS, on top of the codes of one codebook

# Switches of the original layout that change the network: field -> the only value supported.
_FIXED_BOSON_SWITCHES: dict[str, Any] = {
    "audio_embed_avg": False,
    "audio_decoder_proj_num_layers": 0,
    "use_audio_out_embed_projector": False,
    "use_audio_out_self_attention": False,
    "use_rq_transformer": False,
    "use_delay_pattern": True,
}
_FIXED_DECODER_SWITCHES: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretch of the slow rotary frequencies, by its names in ``config.json``."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class HiggsAudioConfig:
    """Sizes and ids of one generation model.

    ``codebook_size`` counts the codes of one codebook together with its BOS and EOS: 1026 for the
    published model, whose original layout writes 1024. Ids are None where neither the file nor the
    vocabulary has them.
    """

    layout: CheckpointLayout
    architecture: str
    dtype: str | None

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None

    num_codebooks: int
    codebook_size: int
    stream_bos_id: int
    stream_eos_id: int

    audio_token_id: int
    audio_in_token_id: int | None
    audio_delay_token_id: int | None
    audio_out_bos_token_id: int
    audio_eos_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    @property
    def audio_placeholder_ids(self) -> frozenset[int]:
        """Ids whose positions hold audio frames, in prompts of either layout."""
        ids = (self.audio_token_id, self.audio_in_token_id, self.audio_delay_token_id)
        return frozenset(each for each in ids if each is not None)

    @classmethod
    def from_folder(cls, folder: Path) -> HiggsAudioConfig:
        """Read ``config.json`` of a checkpoint folder; raises CheckpointError."""
        return cls.from_dict(read_config(folder))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> HiggsAudioConfig:
        """Parse either layout; raises CheckpointError naming the field, value and what is allowed.

        Unknown fields are ignored: the file is not ours.
        """
        layout = _detect_layout(raw)
        fields = _Fields(raw)
        decoder = _Fields(_boson_text_config(raw)) if layout == "boson" else fields
        decoder.require_fixed(_FIXED_DECODER_SWITCHES)
        num_layers = decoder.size("num_hidden_layers")
        if layout == "boson":
            fields.require_fixed(_FIXED_BOSON_SWITCHES)
            _require_all_layers_dual(raw, num_layers)
        vocab_size = decoder.size("vocab_size")
        ids = _Ids(fields, decoder, vocab_size)
        num_heads = decoder.size("num_attention_heads")
        hidden_size = decoder.size("hidden_size")
        architectures = raw.get("architectures") or [_ARCHITECTURES[layout]]
        config = cls(
            layout=layout,
            architecture=str(architectures[0]),
            dtype=raw.get("dtype") or raw.get("torch_dtype"),
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=decoder.size("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=decoder.size("num_key_value_heads", default=num_heads),
            head_dim=decoder.size("head_dim", default=hidden_size // num_heads),
            rms_norm_eps=decoder.number("rms_norm_eps", default=1e-5),
            rope_theta=_rope_theta(decoder),
            rope_scaling=_rope_scaling(decoder),
            num_codebooks=fields.size(
                "audio_num_codebooks" if layout == "boson" else "num_codebooks", default=8
            ),
            codebook_size=_codebook_size(fields, layout),
            stream_bos_id=fields.size("audio_stream_bos_id", default=1024),
            stream_eos_id=fields.size("audio_stream_eos_id", default=1025),
            audio_token_id=ids.required("audio_out", "audio_token_id", "audio_out_token_idx"),
            audio_in_token_id=ids.optional("audio_in", "audio_in_token_idx"),
            audio_delay_token_id=ids.optional("audio_delay", "audio_delay_token_id"),
            audio_out_bos_token_id=ids.required(
                "audio_out_bos", "audio_bos_token_id", "audio_out_bos_token_id"
            ),
            audio_eos_token_id=ids.optional("audio_eos", "audio_eos_token_id"),
            bos_token_id=ids.optional("bos", "bos_token_id"),
            eos_token_id=ids.optional("eos", "eos_token_id"),
            pad_token_id=ids.optional("pad", "pad_token_id"),
        )
        _check_consistent(config)
        return config


def read_config(folder: Path) -> dict[str, Any]:
    """Content of ``config.json`` in ``folder``; raises CheckpointError."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object")
    return content


class _Fields:
    """Typed access to a parsed configuration; a null field counts as absent."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def get(self, name: str) -> Any:
        return self._raw.get(name)

    def size(self, name: str, *, default: int | None = None) -> int:
        value = self._raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"config.json lacks {name}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {name}={value!r} must be a whole number above 0")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        value = self._raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"config.json lacks {name}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CheckpointError(f"config.json: {name}={value!r} must be a number above 0")
        return float(value)

    def token_id(self, name: str) -> int | None:
        value = self._raw.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(f"config.json: {name}={value!r} must be a token id")
        return value

    def require_fixed(self, switches: Mapping[str, Any]) -> None:
        for name, supported in switches.items():
            value = self._raw.get(name)
            if value is not None and value != supported:
                raise CheckpointError(
                    f"config.json: {name}={value!r} is not supported; only {supported!r} is"
                )


class _Ids:
    """Token ids from the file, else the published ones where the vocabulary has room for them."""

    def __init__(self, fields: _Fields, decoder: _Fields, vocab_size: int) -> None:
        self._sources = (fields, decoder)
        self._vocab_size = vocab_size

    def optional(self, role: str, *names: str) -> int | None:
        for source in self._sources:
            for name in names:
                value = source.token_id(name)
                if value is None:
                    continue
                if value >= self._vocab_size:
                    raise CheckpointError(
                        f"config.json: {name}={value} must be below vocab_size={self._vocab_size}"
                    )
                return value
        published = _PUBLISHED_IDS[role]
        return published if published < self._vocab_size else None

    def required(self, role: str, *names: str) -> int:
        value = self.optional(role, *names)
        if value is None:
            raise CheckpointError(f"config.json lacks {' or '.join(names)}")
        return value


def _detect_layout(raw: Mapping[str, Any]) -> CheckpointLayout:
    model_type = raw.get("model_type")
    if model_type == "higgs_audio" or isinstance(raw.get("text_config"), dict):
        return "boson"
    if model_type == "higgs_audio_v2":
        return "transformers"
    raise CheckpointError(
        f"config.json: model_type={model_type!r} is not a Higgs Audio v2 model; "
        "expected 'higgs_audio' or 'higgs_audio_v2'"
    )


def _boson_text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    text_config = raw.get("text_config")
    if not isinstance(text_config, dict):
        raise CheckpointError("config.json lacks text_config, which describes the decoder")
    return text_config


def _require_all_layers_dual(raw: Mapping[str, Any], num_layers: int) -> None:
    layers = raw.get("audio_dual_ffn_layers")
    if layers is not None and sorted(layers) != list(range(num_layers)):
        raise CheckpointError(
            f"config.json: audio_dual_ffn_layers={layers!r} must list all {num_layers} layers"
        )


def _codebook_size(fields: _Fields, layout: CheckpointLayout) -> int:
    if layout == "boson":
        return fields.size("audio_codebook_size", default=1024) + _NUM_STREAM_MARKS
    return fields.size("codebook_size", default=1024 + _NUM_STREAM_MARKS)


def _rope_parameters(decoder: _Fields) -> _Fields:
    return _Fields(decoder.get("rope_parameters") or decoder.get("rope_scaling") or {})


def _rope_theta(decoder: _Fields) -> float:
    nested = _rope_parameters(decoder).get("rope_theta")
    if nested is None:
        return decoder.number("rope_theta", default=500000.0)
    return _rope_parameters(decoder).number("rope_theta")


def _rope_scaling(decoder: _Fields) -> RopeScaling | None:
    rope = _rope_parameters(decoder)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise CheckpointError(
            f"config.json: rope_type={rope_type!r} is not supported; use 'llama3' or 'default'"
        )
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.size("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise CheckpointError(
            f"config.json: high_freq_factor={scaling.high_freq_factor} must be above "
            f"low_freq_factor={scaling.low_freq_factor}"
        )
    return scaling


def _check_consistent(config: HiggsAudioConfig) -> None:
    if config.codebook_size <= config.stream_eos_id:
        raise CheckpointError(
            f"config.json: a codebook of {config.codebook_size} ids has no room for "
            f"audio_stream_eos_id={config.stream_eos_id}; the published model has 1026 ids"
        )
    if config.codebook_size <= config.stream_bos_id or config.stream_bos_id == config.stream_eos_id:
        raise CheckpointError(
            f"config.json: audio_stream_bos_id={config.stream_bos_id} must be below "
            f"{config.codebook_size} and differ from audio_stream_eos_id={config.stream_eos_id}"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads={config.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"config.json: head_dim={config.head_dim} must be even")
