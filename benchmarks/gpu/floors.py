"""What the hardware must do at least: bytes and operations, counted from a model's configuration.

A floor is the time that these take at a card's own speed. Knows no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.checkpoint_config import HiggsAudioConfig

__all__ = [
    "ASSUMED_H200",
    "Ceilings",
    "Work",
    "attention",
    "decode_step",
    "kv_bytes_per_position",
    "linear",
    "matrix_shapes",
    "prefill",
]


@dataclass(frozen=True)
class Ceilings:
    """What a card does at best, and where the figures are from."""

    read_bytes_s: float
    matmul_ops_s: float  # in the type that the model computes in
    source: str


# Of a card that others measured: reading, and products of bfloat16 (design notes of 2026-11).
ASSUMED_H200 = Ceilings(4.3e12, 790e12, "assumed for an H200")


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without.

    Keys and values are read by other kernels than weights are, one after the other; so their times
    add up, while weights are read as the products run.
    """

    weight_bytes: float
    operations: float = 0.0
    kv_bytes: float = 0.0

    @property
    def num_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes

    def floor_s(self, ceilings: Ceilings) -> float:
        """Seconds that no program can go below on such a card."""
        reading = self.weight_bytes / ceilings.read_bytes_s
        computing = self.operations / ceilings.matmul_ops_s
        return max(reading, computing) + self.kv_bytes / ceilings.read_bytes_s


def matrix_shapes(config: HiggsAudioConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each product of a decode step, those of a layer before the head."""
    hidden, middle = config.hidden_size, config.intermediate_size
    width = config.num_attention_heads * config.head_dim
    kv_width = 2 * config.num_key_value_heads * config.head_dim
    return {
        "qkv": (width + kv_width, hidden),
        "o": (hidden, width),
        "gate_up": (2 * middle, hidden),
        "down": (hidden, middle),
        "head": (config.num_codebooks * config.codebook_size, hidden),
    }


def kv_bytes_per_position(config: HiggsAudioConfig, itemsize: float) -> float:
    """Bytes of all layers' keys and values at one position."""
    per_layer = 2 * config.num_key_value_heads * config.head_dim * itemsize
    return config.num_hidden_layers * per_layer


def linear(rows: int, shape: tuple[int, int], *, itemsize: float, activation: float) -> Work:
    """One product of ``rows`` rows: weights, inputs and outputs once."""
    outputs, inputs = shape
    moved = outputs * inputs * itemsize + rows * (inputs + outputs) * activation
    return Work(moved, 2.0 * rows * outputs * inputs)


def attention(config: HiggsAudioConfig, batch: int, context: int, *, itemsize: float) -> Work:
    """Attention of one layer, one query position per row over ``context`` positions."""
    num_bytes = batch * context * kv_bytes_per_position(config, itemsize) / config.num_hidden_layers
    return Work(0.0, kv_bytes=num_bytes)


def decode_step(
    config: HiggsAudioConfig,
    batch: int,
    context: int,
    *,
    weight_itemsize: float,
    kv_itemsize: float,
) -> Work:
    """One frame of ``batch`` rows with ``context`` positions each: audio weights, head, cache."""
    num_weights = _audio_weights(config)
    return Work(
        weight_bytes=num_weights * weight_itemsize,
        operations=2.0 * num_weights * batch,
        kv_bytes=batch * context * kv_bytes_per_position(config, kv_itemsize),
    )


def prefill(
    config: HiggsAudioConfig,
    num_text: int,
    num_audio: int,
    *,
    num_cached: int = 0,
    weight_itemsize: float,
    kv_itemsize: float,
) -> Work:
    """Keys and values of new positions behind ``num_cached``: each feed-forward kind that occurs."""
    shapes = matrix_shapes(config)
    ffn = sum(_size(shapes[name]) for name in ("gate_up", "down"))
    shared = sum(_size(shapes[name]) for name in ("qkv", "o"))
    kinds = (num_text > 0) + (num_audio > 0)
    num_new = num_text + num_audio
    width = config.num_attention_heads * config.head_dim
    seen = num_new * (num_cached + (num_new + 1) / 2)
    layers = config.num_hidden_layers
    return Work(
        weight_bytes=layers * (shared + kinds * ffn) * weight_itemsize,
        operations=layers * (2.0 * num_new * (shared + ffn) + 4.0 * width * seen),
        kv_bytes=num_cached * kv_bytes_per_position(config, kv_itemsize),
    )


def _audio_weights(config: HiggsAudioConfig) -> int:
    shapes = matrix_shapes(config)
    head = _size(shapes.pop("head"))
    return config.num_hidden_layers * sum(map(_size, shapes.values())) + head


def _size(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
