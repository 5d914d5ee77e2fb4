"""Uploaded voices: records and clips as bytes, and what makes a voice of them.

Where the bytes lie is behind ``VoiceFiles``: in a folder (here) or in a bucket (``voice_bucket``),
which several servers may share. Knows neither HTTP nor presets.
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
from typing import Literal, NoReturn, Protocol

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

__all__ = [
    "MAX_NAME_LENGTH",
    "RECORD_FILE",
    "FolderFiles",
    "StoredVoice",
    "VoiceFiles",
    "VoiceKind",
    "VoiceStore",
    "id_of_name",
    "is_voice_id",
    "new_id",
]

logger = get_logger(__name__)

VoiceKind = Literal["audio_sample", "prompt"]

MAX_NAME_LENGTH = 64
RECORD_FILE = "voice.json"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # no dots: hidden folders are not voices
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


class VoiceFiles(Protocol):
    """Where the files of voices lie. Every method raises VoiceStoreError when the place fails.

    Attributes:
        trust_s: seconds for which a voice that was found may be used without asking again.
    """

    trust_s: float

    def records(self) -> dict[str, bytes]:
        """The record of every voice, by id."""

    def record(self, voice_id: str) -> bytes | None:
        """The record of one voice, if there is one."""

    def clip(self, voice_id: str, version: str) -> bytes | None:
        """The clip of one version of a voice; None when that version is gone."""

    def create(self, voice_id: str, version: str, record: bytes, clip: bytes | None) -> bool:
        """Make all files of a voice visible at once; False if there is a voice of this id."""

    def remove(self, voice_id: str, version: str) -> bool:
        """Remove a voice; False if it was gone before."""


class VoiceStore:
    """The voices whose files lie in one place.

    Args:
        files: may be shared with other processes.
        max_voices: uploads beyond this number are refused.
    """

    def __init__(self, files: VoiceFiles, *, max_voices: int = 1000) -> None:
        self._files = files
        self._max_voices = max_voices

    @property
    def trust_s(self) -> float:
        """Seconds for which a voice that was found may be used without asking again."""
        return self._files.trust_s

    def add(
        self, voice: StoredVoice, samples: NDArray[np.float32] | None, sample_rate: int
    ) -> None:
        """Keep a voice and its clip [num_samples] at ``sample_rate`` Hz (16 bits are stored).

        The voice appears with all its files or not at all. Of several uploads of one id at the
        same time, one is kept.

        Raises:
            VoiceConflictError: there is a voice of this id, or no room for one more.
            VoiceStoreError: the store cannot be written.
        """
        _check_id(voice.voice_id)
        if len(self._files.records()) >= self._max_voices:
            raise VoiceConflictError(
                f"there are {self._max_voices} uploaded voices already, the most that this server "
                "keeps (--max-stored-voices); delete one first"
            )
        clip = None if samples is None else encode_all(samples, lookup("wav"), sample_rate)
        record = json.dumps(dataclasses.asdict(voice), ensure_ascii=False, indent=1).encode()
        if not self._files.create(voice.voice_id, voice.version, record, clip):
            raise VoiceConflictError(
                f"there is a voice {voice.voice_id!r} already; delete it first or take another name"
            )

    def get(self, voice_id: str) -> StoredVoice | None:
        """The voice of this id, if there is one; any text may be asked for.

        Raises:
            VoiceStoreError: the store cannot be read.
        """
        record = self._files.record(voice_id) if is_voice_id(voice_id) else None
        return None if record is None else _parse(voice_id, record)

    def read_clip(self, voice: StoredVoice) -> tuple[NDArray[np.float32], int] | None:
        """Samples [num_samples] and rate in Hz; None when the voice was deleted meanwhile.

        Raises:
            VoiceStoreError: the store cannot be read.
        """
        clip = self._files.clip(voice.voice_id, voice.version)
        try:
            return None if clip is None else read_wav(clip)
        except InvalidRequestError as error:
            logger.error("the clip of voice %s cannot be read: %s", voice.voice_id, error)
            return None

    def voices(self) -> list[StoredVoice]:
        """All voices, the oldest first.

        Raises:
            VoiceStoreError: the store cannot be read.
        """
        parsed = [_parse(voice_id, record) for voice_id, record in self._files.records().items()]
        found = [voice for voice in parsed if voice is not None]
        return sorted(found, key=lambda voice: (voice.created_at, voice.voice_id))

    def delete(self, voice_id: str) -> None:
        """Remove a voice; requests that have its clip already go on with it.

        Raises:
            VoiceNotFoundError: there is none of this id.
            VoiceStoreError: the store cannot be written.
        """
        voice = self.get(voice_id)
        if voice is None or not self._files.remove(voice_id, voice.version):
            raise VoiceNotFoundError(f"there is no uploaded voice {voice_id!r}")


class FolderFiles:
    """One folder per voice, written whole and renamed into place.

    Nothing is kept in memory, so that every server on one folder sees the same voices at once.

    Args:
        folder: may be shared with other processes; the first upload makes it.
    """

    trust_s = 0.0

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._remove_debris()

    def records(self) -> dict[str, bytes]:
        found = {}
        for voice_id in self._ids():
            try:
                record = self._read(voice_id, RECORD_FILE)
            except OSError as error:  # one that is damaged must not hide the others
                logger.error("voice %s is passed over: %s", voice_id, error)
                continue
            if record is not None:
                found[voice_id] = record
        return found

    def record(self, voice_id: str) -> bytes | None:
        try:
            return self._read(voice_id, RECORD_FILE)
        except OSError as error:
            self._fail("read", error)

    def clip(self, voice_id: str, version: str) -> bytes | None:
        try:
            return self._read(voice_id, _CLIP_FILE)
        except OSError as error:
            self._fail("read", error)

    def create(self, voice_id: str, version: str, record: bytes, clip: bytes | None) -> bool:
        draft = self._folder / f".new-{secrets.token_hex(8)}"
        try:
            draft.mkdir(parents=True)
            if clip is not None:
                _write(draft / _CLIP_FILE, clip)
            _write(draft / RECORD_FILE, record)
            _flush(draft)
            return self._publish(draft, self._folder / voice_id)
        except OSError as error:
            self._fail("write", error)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _publish(self, draft: Path, target: Path) -> bool:
        """Make a written folder a voice; the first of several uploads of one id wins."""
        try:
            os.rename(draft, target)  # fails where the target holds files, and is atomic
        except OSError:
            if target.exists():
                return False
            raise
        _flush(self._folder)
        return True

    def remove(self, voice_id: str, version: str) -> bool:
        grave = self._folder / f".old-{secrets.token_hex(8)}"
        try:
            os.rename(self._folder / voice_id, grave)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._fail("write", error)
        shutil.rmtree(grave, ignore_errors=True)
        return True

    def _ids(self) -> list[str]:
        try:
            return [name for name in os.listdir(self._folder) if is_voice_id(name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            self._fail("read", error)

    def _read(self, voice_id: str, name: str) -> bytes | None:
        try:
            return (self._folder / voice_id / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _fail(self, verb: str, error: OSError) -> NoReturn:
        logger.error("voice store %s: %s", self._folder, error)
        raise VoiceStoreError(f"this server cannot {verb} its voice store; see its log") from error

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


def is_voice_id(text: str) -> bool:
    """Whether ``text`` may be the id of an uploaded voice."""
    return _ID.fullmatch(text) is not None


def _check_id(voice_id: str) -> None:
    if not is_voice_id(voice_id):
        raise InvalidRequestError(
            f"voice id {voice_id[:80]!r} must have 1 to 64 letters, digits, dashes or underscores",
            param="name",
        )


def _parse(voice_id: str, record: bytes) -> StoredVoice | None:
    """The voice of a record, under the id where it lies: a folder may have been renamed."""
    try:
        voice = StoredVoice(**json.loads(record))
        if not is_voice_id(voice.version):
            raise ValueError(f"version {voice.version!r} is not one")
    except (ValueError, TypeError) as error:
        logger.error("the record of voice %s is passed over: %s", voice_id, error)
        return None
    return dataclasses.replace(voice, voice_id=voice_id)


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
