"""Writes a model's checkpoint again with its matrices in int8 or int4.

Keeps names, layout and all other files, so that the folder loads like the one it came from. Tensors
are read, rounded and written one file at a time. Knows no network; what the rounding costs in
accuracy is ``checkpoints.divergence``'s to say.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vllm.exceptions import CheckpointError
from vllm.kernels.quantize import WeightFormat, head_format, quantize
from vllm.model_executor.models.higgs_audio import canonical_tensor_name, join_split_tensors
from vllm.model_executor.weights import (
    QUANTIZED_SCALE,
    iter_tensors,
    read_config,
    saved_quantization,
)

__all__ = ["quantize_checkpoint"]

_SHARD_BYTES = 4 * 2**30
_HEAD_SUFFIX = "_lm_head.weight"


def quantize_checkpoint(source: Path, target: Path, weight_format: WeightFormat) -> None:
    """Write ``target``, created where needed, from the checkpoint folder ``source``.

    Raises:
        CheckpointError: ``source`` is no model, is quantised already, or is ``target``; or a matrix
            does not fit the format.
    """
    if target.exists() and target.samefile(source):
        raise CheckpointError(f"{target} would overwrite the checkpoint that it is made from")
    config = read_config(source)
    saved = saved_quantization(config, source)
    if saved is not None:
        raise CheckpointError(f"{source} holds {saved} weights already")
    target.mkdir(parents=True, exist_ok=True)
    for stale in (*target.glob("*.safetensors"), *target.glob("*.index.json")):
        stale.unlink()
    _write_shards(source, target, weight_format)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
    config["quantization_config"] = {"quant_method": str(weight_format)}
    _write_json(target / "config.json", config)


def _write_shards(source: Path, target: Path, weight_format: WeightFormat) -> None:
    weight_map: dict[str, str] = {}  # tensor -> file
    shard: dict[str, Tensor] = {}
    total = in_shard = 0
    for name, tensor in _rounded(source, weight_format):
        shard[name] = tensor.contiguous()
        in_shard += tensor.nbytes
        total += tensor.nbytes
        if in_shard >= _SHARD_BYTES:
            weight_map |= dict.fromkeys(shard, _write_shard(target, shard, len(weight_map)))
            shard, in_shard = {}, 0
    if not weight_map:
        save_file(shard, target / "model.safetensors", metadata={"format": "pt"})
        return
    if shard:
        weight_map |= dict.fromkeys(shard, _write_shard(target, shard, len(weight_map)))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(target / "model.safetensors.index.json", index)


def _write_shard(target: Path, shard: dict[str, Tensor], first: int) -> str:
    name = f"model-from-{first:05}.safetensors"
    save_file(shard, target / name, metadata={"format": "pt"})
    return name


def _rounded(source: Path, weight_format: WeightFormat) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in join_split_tensors(iter_tensors(source)):
        chosen = _format_of(name, weight_format)
        if chosen is None:
            yield name, tensor
            continue
        try:
            quantized = quantize(tensor, chosen)
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be quantised: {error}") from error
        yield name, quantized.values
        yield f"{name}{QUANTIZED_SCALE}", quantized.scales


def _format_of(name: str, weight_format: WeightFormat) -> WeightFormat | None:
    """What becomes of a tensor; None for one that is no matrix of a product."""
    canonical = canonical_tensor_name(name)
    if canonical is None:
        return None
    if canonical.endswith(_HEAD_SUFFIX):
        return head_format(weight_format)
    return weight_format if canonical.endswith("_proj.weight") else None


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
