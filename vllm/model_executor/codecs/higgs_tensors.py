"""Tensors of a Higgs Audio v2 codec, whichever of its two checkpoint layouts they come from.

Brings names into one spelling and joins what weight norm holds apart; knows no network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from vllm.exceptions import CheckpointError

__all__ = ["codec_key", "fold_weight_norm", "named_tensors"]

_UNUSED = re.compile(
    r"decoder_semantic\.|fc1\.|semantic_model\.masked_spec_embed$|"
    r".*\.codebook\.(embed_avg|cluster_size|inited)$"
)
_ENCODER_ONLY = re.compile(
    r"acoustic_encoder\.|encoder_semantic\.|semantic_model\.|fc\.|quantizer\..*\.project_in\."
)
_GENERATION_MODEL = re.compile(r"model\.|layers\.|audio_lm_head\.|audio_decoder_proj\.")
_NUM_UNITS = 3  # residual units of a block
_UNIT_PARTS = ("snake1", "conv1", "snake2", "conv2")
_BOSON_PREFIXES = {
    "quantizer.vq.layers.": "quantizer.quantizers.",
    "fc_prior.": "fc.",
    "fc_post1.": "fc1.",
    "fc_post2.": "fc2.",
}


def codec_key(key: str, *, num_blocks: int) -> str:
    """Name of a tensor in transformers' spelling; a name that has it already comes back as it is.

    Args:
        key: name in either layout, with any suffix of weight norm.
        num_blocks: blocks of encoder and decoder, 5 in the published codec.
    """
    if found := re.fullmatch(r"encoder\.block\.(\d+)\.(.+)", key):
        return "acoustic_encoder." + _boson_dac(
            int(found[1]), found[2], num_blocks, first_unit=0, tail=("snake1", "conv1")
        )
    if found := re.fullmatch(r"decoder_2\.model\.(\d+)\.(.+)", key):
        return "acoustic_decoder." + _boson_dac(
            int(found[1]), found[2], num_blocks, first_unit=2, tail=("snake1", "conv_t1")
        )
    for prefix, replacement in _BOSON_PREFIXES.items():
        if key.startswith(prefix):
            return replacement + key[len(prefix) :].replace("._codebook.", ".codebook.")
    if key.startswith(("encoder_semantic.", "decoder_semantic.")):
        return re.sub(r"\.(conv[12]?)\.conv\.", r".\1.", key)
    return key


def _boson_dac(
    index: int, rest: str, num_blocks: int, *, first_unit: int, tail: tuple[str, str]
) -> str:
    """One tensor of the original's numbered sequence, named by what it is."""
    if index == 0:
        return f"conv1.{rest}"
    if index > num_blocks:
        return f"{('snake1', 'conv2')[index - num_blocks - 1]}.{rest}"
    found = re.fullmatch(r"block\.(\d+)\.(?:block\.(\d+)\.)?(.+)", rest)
    if found is None:
        return f"block.{index - 1}.{rest}"
    part, unit_part, leaf = int(found[1]), found[2], found[3]
    if unit_part is not None:
        unit = part - first_unit + 1
        return f"block.{index - 1}.res_unit{unit}.{_UNIT_PARTS[int(unit_part)]}.{leaf}"
    first_tail = 0 if first_unit else _NUM_UNITS
    return f"block.{index - 1}.{tail[part - first_tail]}.{leaf}"


def named_tensors(
    tensors: Iterable[tuple[str, Tensor]], *, num_blocks: int, decode_only: bool, source: str
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint by ``codec_key``, without those that nothing here computes with.

    Args:
        tensors: names and values, in either layout.
        num_blocks: see ``codec_key``.
        decode_only: leave the encoder's out too.
        source: where they come from, for messages.

    Raises:
        CheckpointError: they are the generation model's.
    """
    for key, tensor in tensors:
        if _GENERATION_MODEL.match(key):
            raise CheckpointError(
                f"{source} holds {key!r}: these are weights of the generation model, not of the "
                "codec; remove the stray file or take another revision"
            )
        name = codec_key(key, num_blocks=num_blocks)
        if _UNUSED.match(name) or (decode_only and _ENCODER_ONLY.match(name)):
            continue
        yield name, tensor


def fold_weight_norm(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Replace each pair of length and direction by the weight that it stands for.

    ``weight = g * v / |v|`` with the norm over every dimension that ``g`` has reduced to 1. Both
    spellings are known: ``weight_g`` / ``weight_v``, and ``parametrizations.weight.original0/1``.
    """
    halves: dict[str, dict[str, Tensor]] = {}  # weight name -> {"g": ..., "v": ...}
    for name, tensor in tensors:
        found = re.fullmatch(
            r"(.+)\.(?:weight_([gv])|parametrizations\.weight\.original([01]))", name
        )
        if found is None:
            yield name, tensor
            continue
        weight = f"{found[1]}.weight"
        pair = halves.setdefault(weight, {})
        pair[found[2] or "gv"[int(found[3])]] = tensor
        if len(pair) == 2:
            del halves[weight]
            yield weight, _folded(weight, pair["g"], pair["v"])
    for weight, pair in halves.items():
        yield f"{weight}_{next(iter(pair))}", next(iter(pair.values()))


def _folded(name: str, length: Tensor, direction: Tensor) -> Tensor:
    if length.ndim != direction.ndim:
        raise CheckpointError(
            f"{name}: weight norm of shapes {list(length.shape)} and {list(direction.shape)}"
        )
    reduced = [dim for dim, size in enumerate(length.shape) if size == 1]
    norm: Tensor = torch.linalg.vector_norm(direction, dim=reduced, keepdim=True)
    return direction * (length / norm)
