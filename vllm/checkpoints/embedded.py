"""The models that need no download: the one that ships with the package, and a random one.

The random one is written at first use into the cache folder: it exercises the whole engine, its
codec encodes clips, and it makes noise. Knows nothing of how they are served.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from vllm import envs
from vllm.logger import get_logger

__all__ = ["embedded_checkpoint", "random_checkpoint"]

logger = get_logger(__name__)

_SHIPPED = Path(__file__).parent.parent / "assets" / "higgs-audio-tiny"
_NAME = "embedded-random-1"  # changes whenever its content would
_SEED = 0


def embedded_checkpoint() -> Path:
    """Folder with ``lm``, ``codec`` and ``voices`` of the model that ships with the package."""
    return _SHIPPED if (_SHIPPED / "lm").is_dir() else random_checkpoint()


def random_checkpoint() -> Path:
    """Folder with ``lm`` and ``codec``, made at the first call on a machine."""
    folder = envs.VLLM_CACHE_ROOT / _NAME
    if not folder.is_dir():
        _make(folder)
    return folder


def _make(folder: Path) -> None:
    """Write beside the place and rename, so that a half-written folder is never used."""
    from vllm.checkpoints.make_model import write_checkpoint

    logger.info("writing the random model to %s (first start)", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{_NAME}-", dir=folder.parent))
    try:
        write_checkpoint(partial, layout="transformers", size="tiny", seed=_SEED)
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
