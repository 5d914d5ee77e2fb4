"""Remembers the codes of reference clips, in memory and on disk.

Knows neither how a clip is encoded nor whose voice it is; a damaged file is as good as none.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm.logger import get_logger

__all__ = ["ClipCache"]

logger = get_logger(__name__)


class ClipCache:
    """Codes by content: the least recently used clips leave memory, the disk keeps all.

    Args:
        folder: where to keep ``.npy`` files, made when needed; None for memory only.
        max_clips: clips kept in memory.
    """

    def __init__(self, folder: Path | None = None, *, max_clips: int = 256) -> None:
        self._folder = folder
        self._max_clips = max_clips
        self._recent: OrderedDict[str, NDArray[np.int16]] = OrderedDict()  # key -> [K, T]

    @staticmethod
    def key(samples: NDArray[np.float32], fingerprint: str) -> str:
        """Name of a clip as one codec's encoder hears it. Samples are float32 [n]."""
        digest = hashlib.sha256(fingerprint.encode())
        digest.update(np.ascontiguousarray(samples, dtype="<f4").tobytes())
        return digest.hexdigest()[:40]

    def get(self, key: str) -> NDArray[np.int16] | None:
        """Codes int16 [K, T] of a clip, or None when it was never stored."""
        codes = self._recent.get(key)
        if codes is None:
            codes = self._read(key)
        if codes is not None:
            self._remember(key, codes)
        return codes

    def put(self, key: str, codes: NDArray[np.int16]) -> None:
        """Store codes int16 [K, T]. A disk that refuses is logged and otherwise ignored."""
        self._remember(key, codes)
        if self._folder is None:
            return
        try:
            self._write(self._folder, key, codes)
        except OSError as error:
            logger.warning("cannot keep an encoded clip in %s: %s", self._folder, error)

    def _remember(self, key: str, codes: NDArray[np.int16]) -> None:
        self._recent[key] = codes
        self._recent.move_to_end(key)
        while len(self._recent) > self._max_clips:
            self._recent.popitem(last=False)

    def _read(self, key: str) -> NDArray[np.int16] | None:
        if self._folder is None:
            return None
        try:
            codes = np.load(self._folder / f"{key}.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        is_sound = isinstance(codes, np.ndarray) and codes.dtype == np.int16 and codes.ndim == 2
        return codes if is_sound else None

    def _write(self, folder: Path, key: str, codes: NDArray[np.int16]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=folder, prefix=key, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, codes, allow_pickle=False)
            Path(partial).replace(folder / f"{key}.npy")
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
