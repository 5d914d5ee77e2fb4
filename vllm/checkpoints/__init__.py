"""Random checkpoints in the published layouts, and a report on any checkpoint.

The two functions here are what the ``vllm checkpoint`` command calls; they import torch only when
they run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.checkpoint_config import CheckpointLayout

__all__ = ["run_inspect", "run_make"]


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
