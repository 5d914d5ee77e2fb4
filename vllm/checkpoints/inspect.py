"""Says what a checkpoint holds and what is wrong with it.

Of a generation model it reads names and shapes only; a codec is small, so it is loaded. The numbers
in the tensors are never judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vllm.checkpoint_config import CheckpointLayout, HiggsAudioConfig
from vllm.exceptions import CheckpointError
from vllm.model_executor.codecs import is_codec, load_codec
from vllm.model_executor.models.higgs_audio import (
    HiggsAudioModel,
    canonical_tensor_name,
    detect_key_layout,
    join_split_tensors,
)
from vllm.model_executor.weights import (
    QUANTIZED_SCALE,
    dequantized,
    iter_tensors,
    read_config,
    saved_quantization,
)

__all__ = ["CheckpointReport", "inspect_checkpoint"]

_TEXT_HEAD = "text_lm_head.weight"
_GROUPS = (
    ("embeddings", ("embed_tokens", "embed_audio_tokens")),
    ("attention", ("self_attn",)),
    ("audio FFN", ("audio_mlp",)),
    ("text FFN", ("mlp",)),
    ("norms", ("norm",)),
    ("audio head", ("audio_lm_head",)),
    ("text head", ("text_lm_head",)),
)


@dataclass(frozen=True)
class CheckpointReport:
    """Findings on one folder; an empty ``problems`` means that it loads."""

    folder: Path
    config: HiggsAudioConfig | None = None
    key_layout: CheckpointLayout | None = None
    num_parameters: Mapping[str, int] = field(default_factory=dict)  # group -> parameters
    num_bytes: int = 0
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def text(self) -> str:
        """The report in lines for people."""
        lines = [f"{self.folder}", *(f"  {remark}" for remark in self.remarks)]
        if self.config is not None:
            lines += _config_lines(self.config)
        if self.key_layout is not None:
            lines.append(f"  tensor keys       {self.key_layout}")
        for group, count in self.num_parameters.items():
            lines.append(f"  {group:<17} {count:,} parameters")
        if self.num_parameters:
            total = sum(self.num_parameters.values())
            lines.append(f"  total             {total:,} parameters, {self.num_bytes:,} bytes")
        lines += [f"  problem: {problem}" for problem in self.problems]
        if not self.problems:
            lines.append("  no problems")
        return "\n".join(lines)


def inspect_checkpoint(folder: Path) -> CheckpointReport:
    """Report on the folder of a model or a codec; problems are findings, not exceptions."""
    try:
        if is_codec(folder):
            return _inspect_codec(folder)
        config = HiggsAudioConfig.from_folder(folder)
    except CheckpointError as error:
        return CheckpointReport(folder, problems=(str(error),))
    problems: list[str] = []
    shapes: dict[str, torch.Size] = {}
    spelled: list[str] = []
    try:
        quantization = saved_quantization(read_config(folder), folder)
        for name, tensor in join_split_tensors(dequantized(iter_tensors(folder))):
            spelled.append(name)
            canonical = canonical_tensor_name(name)
            if canonical is not None:
                shapes[canonical] = tensor.shape
        num_bytes = sum(each.nbytes for name, each in iter_tensors(folder) if _is_used(name))
        key_layout = detect_key_layout(spelled)
    except CheckpointError as error:
        return CheckpointReport(folder, config, problems=(str(error),))
    problems += _shape_problems(config, shapes)
    problems += [f"no {name}" for name in ("tokenizer.json",) if not (folder / name).is_file()]
    return CheckpointReport(
        folder,
        config,
        key_layout,
        _count_parameters(shapes),
        num_bytes,
        tuple(problems),
        remarks=() if quantization is None else (f"quantised         {quantization}",),
    )


def _is_used(name: str) -> bool:
    return canonical_tensor_name(name.removesuffix(QUANTIZED_SCALE)) is not None


def _inspect_codec(folder: Path) -> CheckpointReport:
    codec = load_codec(folder, device="cpu")
    parameters = list(codec.parameters())
    return CheckpointReport(
        folder,
        num_parameters={"codec": sum(each.numel() for each in parameters)},
        num_bytes=sum(each.nbytes for each in parameters),
        remarks=(
            f"codec             {codec.num_codebooks} codebooks x {codec.codebook_size} codes, "
            f"{codec.sample_rate} Hz, {codec.frame_rate:g} frames a second",
            f"encodes clips     {'yes' if codec.can_encode else 'no (decode_only)'}",
            f"fingerprint       {codec.fingerprint}",
        ),
    )


def _shape_problems(config: HiggsAudioConfig, shapes: Mapping[str, torch.Size]) -> list[str]:
    with torch.device("meta"):
        network = HiggsAudioModel(
            config, dtype=torch.float32, max_model_len=1, with_text_head=_TEXT_HEAD in shapes
        )
    wanted = {name: target.shape for name, target in network.targets().items()}
    problems = [
        f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in shapes
    ]
    for name, shape in shapes.items():
        if name not in wanted:
            problems.append(f"unexpected: {name} {list(shape)}")
        elif shape != wanted[name]:
            problems.append(f"wrong shape: {name} is {list(shape)}, expected {list(wanted[name])}")
    return problems


def _count_parameters(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        group = next(
            (
                title
                for title, stems in _GROUPS
                if any(stem in parts or part.endswith(stem) for stem in stems for part in parts)
            ),
            "other",
        )
        counts[group] = counts.get(group, 0) + shape.numel()
    return counts


def _config_lines(config: HiggsAudioConfig) -> list[str]:
    return [
        f"  configuration     {config.layout} ({config.architecture}), dtype {config.dtype}",
        f"  decoder           {config.num_hidden_layers} layers x {config.hidden_size}, "
        f"FFN {config.intermediate_size}, {config.num_attention_heads}/"
        f"{config.num_key_value_heads} heads of {config.head_dim}",
        f"  text              {config.vocab_size} ids",
        f"  audio             {config.num_codebooks} codebooks x {config.codebook_size} ids",
    ]
