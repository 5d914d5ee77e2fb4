"""Random checkpoints in the published layouts, quantised copies, and a report on any checkpoint.

The functions here are what the ``vllm checkpoint`` command calls; they import torch only when
they run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.checkpoint_config import CheckpointLayout

__all__ = ["run_inspect", "run_make", "run_quantize"]

_PROMPT_LEN = 32  # random text ids that a comparison begins with


def run_make(
    out_dir: Path, *, layout: CheckpointLayout = "boson", size: str = "tiny", seed: int = 0
) -> str:
    """Write ``out_dir/lm`` and ``out_dir/codec`` and say what they hold.

    Args:
        out_dir: created where needed; existing checkpoint files in it are replaced.
        layout: boson or transformers.
        size: tiny, medium, 3b, or the path of a ``config.json`` in either layout.
        seed: equal seeds give equal files.

    Raises:
        CheckpointError: unknown layout or size, or a configuration that cannot be built.
    """
    from vllm.checkpoints.inspect import inspect_checkpoint
    from vllm.checkpoints.make_model import write_checkpoint

    write_checkpoint(out_dir, layout=layout, size=size, seed=seed)
    return inspect_checkpoint(out_dir / "lm").text()


def run_inspect(path: Path) -> tuple[str, bool]:
    """Report on a checkpoint folder, or on its ``lm`` part, and whether it is without problems."""
    from vllm.checkpoints.inspect import inspect_checkpoint

    nested = path / "lm"
    report = inspect_checkpoint(nested if nested.is_dir() else path)
    return report.text(), not report.problems


def run_quantize(
    source: Path, target: Path, *, quantization: str, num_frames: int = 64, seed: int = 0
) -> str:
    """Write ``target``, a model whose matrices are int8 or int4, and say how far it is off.

    Args:
        source: folder of a model, or one with it in its ``lm`` part.
        target: folder of the new model, created where needed.
        quantization: int8 or int4.
        num_frames: frames that both models are compared on; 0 compares nothing, which needs neither
            the time nor the memory of two models.
        seed: of prompt and frames.

    Raises:
        CheckpointError: the model is quantised already, or does not fit the format.
    """
    import torch

    from vllm.checkpoints.divergence import measure_divergence
    from vllm.checkpoints.quantize import quantize_checkpoint
    from vllm.kernels.quantize import WeightFormat
    from vllm.model_executor.models import load_model

    nested = source / "lm"
    source = nested if nested.is_dir() else source
    quantize_checkpoint(source, target, WeightFormat(quantization))
    sizes = [sum(each.stat().st_size for each in _weights(folder)) for folder in (source, target)]
    lines = [
        f"{target}",
        f"  weights           {quantization}, {sizes[1]:,} bytes, before {sizes[0]:,}",
    ]
    if num_frames:
        exact, rounded = (
            load_model(folder, dtype="float32", max_model_len=_PROMPT_LEN + num_frames)
            for folder in (source, target)
        )
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(exact.spec.vocab_size, (_PROMPT_LEN,), generator=generator)
        divergence = measure_divergence(exact, rounded, ids, num_frames=num_frames, seed=seed)
        lines.append(f"  against float32   {divergence.text()}")
    return "\n".join(lines)


def _weights(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pth")]
