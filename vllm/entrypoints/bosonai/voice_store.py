"""Uploaded voices on disk: one folder per voice, written whole, readable by many processes at once.

Nothing is kept in memory, so that every server on one folder sees the same voices at once. Knows
neither HTTP nor presets.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vllm.audio import encode_all, lookup, read_wav
from vllm.exceptions import (
    InvalidRequestError,
    VoiceConflictError,
    VoiceNotFoundError,
    VoiceStoreError,
)
from vllm.logger import get_logger

__all__ = ["MAX_NAME_LENGTH", "StoredVoice", "VoiceKind", "VoiceStore", "id_of_name", "new_id"]

logger = get_logger(__name__)

VoiceKind = Literal["audio_sample", "prompt"]

MAX_NAME_LENGTH = 64
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # no dots: hidden folders are not voices
_RECORD_FILE = "voice.json"
_CLIP_FILE = "clip.wav"
_DEBRIS_AGE_S = 3600.0  # no upload takes this long


@dataclass(frozen=True)
class StoredVoice:
    """What ``voice.json`` holds."""

    voice_id: str
    name: str
    kind: VoiceKind
    created_at: int  # seconds since 1970
    version: str  # random; differs when a voice is deleted and made again
    transcript: str | None = None  # of the clip; voices of kind audio_sample have one
    scene: str | None = None  # what voices of kind prompt sound like
    language: str = "en"
    description: str = ""
    consent: str | None = None  # as the uploader stated it
    duration_s: float = 0.0


class VoiceStore:
    """The voices of one folder, which is made by the first upload.

    Args:
        folder: may be shared with other processes.
        max_voices: uploads beyond this number are refused.
    """

    def __init__(self, folder: Path, *, max_voices: int = 1000) -> None:
        self._folder = folder
        self._max_voices = max_voices
        self._remove_debris()

    def add(
        self, voice: StoredVoice, samples: NDArray[np.float32] | None, sample_rate: int
    ) -> None:
        """Keep a voice and its clip [num_samples] at ``sample_rate`` Hz (16 bits are stored).

        The voice appears with all its files or not at all.

        Raises:
            VoiceConflictError: there is a voice of this id, or no room for one more.
            VoiceStoreError: the folder cannot be written.
        """
        _check_id(voice.voice_id)
        if len(self._ids()) >= self._max_voices:
            raise VoiceConflictError(
                f"there are {self._max_voices} uploaded voices already, the most that this server "
                "keeps (--max-stored-voices); delete one first"
            )
        target = self._folder / voice.voice_id
        draft = self._folder / f".new-{secrets.token_hex(8)}"
        try:
            draft.mkdir(parents=True)
            if samples is not None:
                _write(draft / _CLIP_FILE, encode_all(samples, lookup("wav"), sample_rate))
            record = json.dumps(dataclasses.asdict(voice), ensure_ascii=False, indent=1)
            _write(draft / _RECORD_FILE, record.encode())
            _flush(draft)
            self._publish(draft, target)
        except OSError as error:
            logger.error("voice store %s: %s", self._folder, error)
            raise VoiceStoreError(
                "this server cannot write its voice store; see its log"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _publish(self, draft: Path, target: Path) -> None:
        """Make a written folder a voice; the first of several uploads of one id wins."""
        try:
            os.rename(draft, target)  # fails where the target holds files, and is atomic
        except OSError as error:
            if not target.exists():
                raise
            raise VoiceConflictError(
                f"there is a voice {target.name!r} already; delete it first or take another name"
            ) from error
        _flush(self._folder)

    def get(self, voice_id: str) -> StoredVoice | None:
        """The voice of this id, if there is one; any text may be asked for."""
        return self._read(voice_id) if _ID.fullmatch(voice_id) else None

    def read_clip(self, voice: StoredVoice) -> tuple[NDArray[np.float32], int] | None:
        """Samples [num_samples] and rate in Hz; None when the voice was deleted meanwhile."""
        try:
            return read_wav(self._folder / voice.voice_id / _CLIP_FILE)
        except (OSError, InvalidRequestError) as error:
            logger.warning("the clip of voice %s cannot be read: %s", voice.voice_id, error)
            return None

    def voices(self) -> list[StoredVoice]:
        """All voices, the oldest first."""
        found = [voice for name in self._ids() if (voice := self._read(name)) is not None]
        return sorted(found, key=lambda voice: (voice.created_at, voice.voice_id))

    def delete(self, voice_id: str) -> None:
        """Remove a voice; requests that have its clip already go on with it.

        Raises:
            VoiceNotFoundError: there is none of this id.
            VoiceStoreError: the folder cannot be written.
        """
        if self.get(voice_id) is None:
            raise VoiceNotFoundError(f"there is no uploaded voice {voice_id!r}")
        grave = self._folder / f".old-{secrets.token_hex(8)}"
        try:
            os.rename(self._folder / voice_id, grave)
        except FileNotFoundError:
            raise VoiceNotFoundError(f"there is no uploaded voice {voice_id!r}") from None
        except OSError as error:
            logger.error("voice store %s: %s", self._folder, error)
            raise VoiceStoreError(
                "this server cannot write its voice store; see its log"
            ) from error
        shutil.rmtree(grave, ignore_errors=True)

    def _ids(self) -> list[str]:
        try:
            return [name for name in os.listdir(self._folder) if _ID.fullmatch(name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            logger.error("voice store %s: %s", self._folder, error)
            raise VoiceStoreError("this server cannot read its voice store; see its log") from error

    def _read(self, voice_id: str) -> StoredVoice | None:
        path = self._folder / voice_id / _RECORD_FILE
        try:
            voice = StoredVoice(**json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError) as error:
            logger.error("%s cannot be read and is passed over: %s", path, error)
            return None
        return dataclasses.replace(voice, voice_id=voice_id)  # a folder may have been renamed

    def _remove_debris(self) -> None:
        """Remove what a process left behind that died during an upload or a deletion."""
        for pattern in (".new-*", ".old-*"):
            for path in self._folder.glob(pattern):
                try:
                    age_s = time.time() - path.stat().st_mtime
                except OSError:  # another process was faster
                    continue
                if age_s > _DEBRIS_AGE_S:
                    shutil.rmtree(path, ignore_errors=True)


def id_of_name(name: str) -> str:
    """Id that a voice of this name gets: its letters and digits without accents, else a random one.

    Raises:
        InvalidRequestError: the name is empty, too long, or holds control characters.
    """
    name = name.strip()
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise InvalidRequestError(
            f"name {name[:80]!r} must have 1 to {MAX_NAME_LENGTH} printable characters",
            param="name",
        )
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9-]+", "_", plain).strip("_-")
    return slug[:MAX_NAME_LENGTH] or f"voice_{new_id()}"


def new_id() -> str:
    """32 random hexadecimal digits."""
    return secrets.token_hex(16)


def _check_id(voice_id: str) -> None:
    if not _ID.fullmatch(voice_id):
        raise InvalidRequestError(
            f"voice id {voice_id[:80]!r} must have 1 to 64 letters, digits, dashes or underscores",
            param="name",
        )


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Make the names of a folder's files last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
