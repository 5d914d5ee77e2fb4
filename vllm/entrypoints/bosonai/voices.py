"""The voices of a presets folder and of a store of uploads: reading, checking, naming.

Clips become samples at the codec's rate, or codes that the folder ships. Knows neither HTTP nor
how the engine encodes a clip.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vllm.audio import decode_clip, pad_to_multiple, read_wav, resample
from vllm.entrypoints.bosonai.voice_store import StoredVoice, VoiceStore
from vllm.exceptions import (
    ConfigError,
    InvalidRequestError,
    UnknownVoiceError,
    VoiceStoreError,
)
from vllm.logger import get_logger
from vllm.prompts import DEFAULT_MAX_CHARS, PromptClip, Voice

if TYPE_CHECKING:
    from vllm.config import EngineConfig
    from vllm.v1.engine.messages import EngineInfo

__all__ = ["OPENAI_VOICE_ALIASES", "SHIPPED_PRESETS", "VoiceLibrary", "check_presets"]

logger = get_logger(__name__)

SHIPPED_PRESETS = Path(__file__).parent / "voice_presets"

#: OpenAI's names -> shipped voice. A preset of the same name goes first; an alias whose voice the
#: folder lacks means the default voice.
OPENAI_VOICE_ALIASES = {
    "alloy": "en_woman",
    "ash": "en_man",
    "ballad": "en_man",
    "coral": "en_woman",
    "echo": "en_man",
    "fable": "en_man",
    "onyx": "en_man",
    "nova": "en_woman",
    "sage": "en_woman",
    "shimmer": "en_woman",
    "verse": "en_man",
    "marin": "en_woman",
    "cedar": "en_man",
}

# Of ids, where a preset does not say; the names are those of folders for older servers.
_LANGUAGES = frozenset({"de", "en", "es", "fr", "it", "ja", "ko", "pt", "zh"})
_TEXT_KEYS = ("transcript", "audio_file", "system_prompt", "scene", "language", "description")
_KEY_TYPES: dict[str, type] = {
    **dict.fromkeys((*_TEXT_KEYS, "name", "codes_file"), str),
    **dict.fromkeys(("default", "speaks", "trained"), bool),
    "max_chars": int,
}

_ANY_RATE_HZ = 24_000  # where no codec is loaded; lengths are shown in seconds
_MAX_SHOWN_NAMES = 32
_STORE_THREADS = 4
_MAX_OPEN_UPLOADS = 32  # whose clips stay in memory; half a minute is 3 MB

_Stamp = tuple[tuple[str, int, int], ...]  # (path, mtime in ns, size) of every file


@dataclass(frozen=True)
class _Snapshot:
    """The folder as it was read at one time; replaced as a whole, never changed."""

    voices: dict[str, Voice]  # voice id -> voice, in the order of config.json
    default_id: str
    stamp: _Stamp


@dataclass(frozen=True)
class _OpenUpload:
    """An uploaded voice with its clip in memory."""

    stored: StoredVoice
    voice: Voice
    asked_s: float  # when the store was last asked for it


class VoiceLibrary:
    """Voices of one presets folder, reread when its files change, and of a store of uploads.

    Preset files are looked at when a voice is asked for, at most every ``refresh_interval_s``; a
    folder that has become invalid keeps the voices it had and is logged once. A preset goes before
    an upload of the same id.

    The store is asked each time, or again after ``store.trust_s``. While it fails, uploads whose
    clips are in memory are used as they were.

    Args:
        folder: holds ``config.json`` and the clips; None is the shipped one.
        sample_rate: of the codec, in Hz.
        hop_length: samples per codec frame; clips are padded to a multiple of it.
        codec_fingerprint: hash of the codec; key of shipped codes.
        num_codebooks: rows of shipped codes.
        store: of uploaded voices; None offers presets alone.
        can_encode: False if the codec cannot encode, so that voices need shipped codes.
        default_voice: id or alias; None is the entry with ``"default": true``, else the first.
        pinned_voices: ids and aliases of those that are pinned; None pins all.
        refresh_interval_s: least seconds between two looks at the files.
        clock: monotonic seconds.

    Raises:
        ConfigError: the folder or the default voice is wrong; the message names the entry.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        sample_rate: int,
        hop_length: int,
        codec_fingerprint: str,
        num_codebooks: int,
        can_encode: bool,
        store: VoiceStore | None = None,
        default_voice: str | None = None,
        pinned_voices: Collection[str] | None = None,
        refresh_interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder or SHIPPED_PRESETS
        self._sample_rate = sample_rate
        self._hop_length = hop_length
        self._codec_fingerprint = codec_fingerprint
        self._num_codebooks = num_codebooks
        self._can_encode = can_encode
        self._store = store
        # The store has threads of its own: while it does not answer, other voices are not held up.
        self.store_threads = ThreadPoolExecutor(_STORE_THREADS, thread_name_prefix="voice-store")
        self._uploads: OrderedDict[str, _OpenUpload] = OrderedDict()
        self._num_forgotten = 0
        self._default_voice = default_voice
        self._pinned_voices = pinned_voices
        self._refresh_interval_s = refresh_interval_s
        self._clock = clock
        self._lock = Lock()
        self._snapshot = self._load(_stamp(self._folder))
        self._next_look_s = clock() + refresh_interval_s
        self._refused_stamp: _Stamp | None = None

    @classmethod
    def for_engine(
        cls,
        info: EngineInfo,
        *,
        folder: Path | None = None,
        store: VoiceStore | None = None,
        default_voice: str | None = None,
        pinned_voices: Collection[str] | None = None,
        refresh_interval_s: float = 10.0,
    ) -> VoiceLibrary:
        """Voices as the codec of a loaded engine takes them; raises as the constructor does."""
        library = cls(
            folder or (Path(info.voices_folder) if info.voices_folder else None),
            sample_rate=info.sample_rate,
            hop_length=info.hop_length,
            codec_fingerprint=info.codec_fingerprint,
            num_codebooks=info.num_codebooks,
            can_encode=info.can_encode,
            store=store,
            default_voice=default_voice,
            pinned_voices=pinned_voices,
            refresh_interval_s=refresh_interval_s,
        )
        try:
            library.resolve(None)
        except InvalidRequestError as error:
            logger.warning("requests that name no voice will be refused: %s", error)
        return library

    @classmethod
    def without_engine(
        cls, folder: Path | None = None, *, default_voice: str | None = None
    ) -> VoiceLibrary:
        """Voices to look at before any codec is known; raises as the constructor does."""
        return cls(
            folder,
            sample_rate=_ANY_RATE_HZ,
            hop_length=1,
            codec_fingerprint="",
            num_codebooks=1,
            can_encode=True,
            default_voice=default_voice,
        )

    @property
    def default_id(self) -> str:
        """Id of the voice that a request without a voice gets."""
        return self._current().default_id

    @property
    def names(self) -> list[str]:
        """Ids of all voices, without aliases; presets first."""
        presets = self._current().voices
        return [*presets, *(voice.voice_id for voice in self._stored_beside(presets))]

    @property
    def store(self) -> VoiceStore | None:
        """Where uploads are kept; None if there are none."""
        return self._store

    def preset_names(self) -> Sequence[str]:
        """Ids of the presets."""
        return list(self._current().voices)

    def is_preset(self, name: str) -> bool:
        """Whether ``name`` is the id of a preset, or an alias, so that no upload may have it."""
        return name in OPENAI_VOICE_ALIASES or name in self._current().voices

    def threads_for(self, *names: str | None) -> Executor | None:
        """Where to ``resolve`` these names: ``store_threads`` if the store may have to be asked."""
        presets = self._snapshot.voices
        is_shipped = all(n is None or n in OPENAI_VOICE_ALIASES or n in presets for n in names)
        return None if is_shipped else self.store_threads

    def forget(self, voice_id: str) -> None:
        """Ask the store for an upload the next time, since it was changed."""
        with self._lock:
            self._num_forgotten += 1
            self._uploads.pop(voice_id, None)

    def resolve(self, voice: str | Mapping[str, Any] | None = None) -> Voice:
        """Voice of an id, an alias or ``{"id": ...}``; None is the default voice.

        For a voice that does not speak it is the default voice, whose ``asked_for`` names the other.

        Raises:
            UnknownVoiceError: there is none of that name; the message lists the presets.
            InvalidRequestError: not a name, or the codec cannot encode and there are no codes.
            VoiceStoreError: it is no preset, and the store cannot be asked.
        """
        snapshot = self._current()
        name = _requested_name(voice)
        default_id = snapshot.default_id
        found = default_id if name is None else _find(name, snapshot.voices, fallback=default_id)
        if found is not None:
            resolved: Voice | None = snapshot.voices[found]
        elif resolved := self._uploaded(name or ""):
            # How much a model speaks in one part is known of its default voice only.
            resolved = replace(resolved, max_chars=snapshot.voices[default_id].max_chars)
        if resolved is None:
            raise UnknownVoiceError(
                f"voice {name!r} is unknown; available are {self._offer(snapshot)}",
                param="voice",
            )
        if not resolved.speaks:
            return replace(snapshot.voices[default_id], asked_for=resolved.voice_id)
        needs_encoding = resolved.clip is not None and resolved.clip.samples is not None
        if needs_encoding and not self._can_encode:
            raise InvalidRequestError(
                f"voice {resolved.voice_id!r} cannot be used: the served codec cannot encode "
                f"clips, and the voice ships no codes for it (codec {self._codec_fingerprint})",
                param="voice",
            )
        return resolved

    def list(self) -> list[dict[str, Any]]:
        """One entry per voice, as ``GET /v1/audio/voices`` shows it; presets first."""
        presets = self._current().voices
        uploads = [_without_clip(stored) for stored in self._stored_beside(presets)]
        return [
            *(_list_entry(voice, is_upload=False) for voice in presets.values()),
            *(_list_entry(voice, is_upload=True) for voice in uploads),
        ]

    def _stored_beside(self, presets: Mapping[str, Voice]) -> Sequence[StoredVoice]:
        stored = self._store.voices() if self._store is not None else []
        return [voice for voice in stored if voice.voice_id not in presets]

    def _uploaded(self, voice_id: str) -> Voice | None:
        """An uploaded voice with its clip, which is read once per version of the voice."""
        if self._store is None:
            return None
        with self._lock:
            known = self._uploads.get(voice_id)
            num_forgotten, now_s = self._num_forgotten, self._clock()
        if known is not None and now_s < known.asked_s + self._store.trust_s:
            return known.voice
        try:
            stored = self._store.get(voice_id)
        except VoiceStoreError:
            if known is None:
                raise
            return known.voice
        if stored is not None and known is not None and known.stored == stored:
            voice: Voice | None = known.voice
        else:
            voice = self._read_upload(stored) if stored is not None else None
        with self._lock:
            if num_forgotten == self._num_forgotten:
                self._remember(voice_id, stored, voice, now_s)
        return voice

    def _remember(
        self, voice_id: str, stored: StoredVoice | None, voice: Voice | None, asked_s: float
    ) -> None:
        self._uploads.pop(voice_id, None)
        if stored is None or voice is None:
            return
        self._uploads[voice_id] = _OpenUpload(stored, voice, asked_s)
        if len(self._uploads) > _MAX_OPEN_UPLOADS:
            self._uploads.popitem(last=False)

    def _offer(self, snapshot: _Snapshot) -> str:
        """What a message says of the voices there are; the store is not asked for it."""
        presets = _shortened(list(snapshot.voices))
        return presets if self._store is None else f"{presets} and uploads (GET /v1/audio/voices)"

    def _read_upload(self, stored: StoredVoice) -> Voice | None:
        assert self._store is not None, "stored voices come from a store"
        named = self._pinned_voices
        is_pinned = named is None or stored.voice_id in named
        voice = replace(_without_clip(stored), is_pinned=is_pinned)
        if stored.kind == "prompt":
            return voice
        clip = self._store.read_clip(stored)
        if clip is None:
            return None
        samples, rate = clip
        return replace(voice, clip=self._clip_of(resample(samples, rate, self._sample_rate)))

    def _current(self) -> _Snapshot:
        """The voices as the files have them now, or had them at the last look."""
        with self._lock:
            now = self._clock()
            if now < self._next_look_s:
                return self._snapshot
            self._next_look_s = now + self._refresh_interval_s
            stamp = _stamp(self._folder)
            if stamp not in (self._snapshot.stamp, self._refused_stamp):
                self._reload(stamp)
            return self._snapshot

    def _reload(self, stamp: _Stamp) -> None:
        try:
            self._snapshot = self._load(stamp)
        except ConfigError as error:
            self._refused_stamp = stamp
            logger.error("the voices stay as they were: %s", error)
            return
        self._refused_stamp = None
        logger.info("voices reread from %s: %s", self._folder, ", ".join(self._snapshot.voices))

    def _load(self, stamp: _Stamp) -> _Snapshot:
        try:
            entries = _read_entries(self._folder / "config.json")
            voices = {name: self._read_voice(name, entry) for name, entry in entries.items()}
        except ConfigError as error:
            raise ConfigError(f"--voice-presets-dir {self._folder}: {error}") from error
        default_id = self._choose_default(voices)
        named = voices if self._pinned_voices is None else self._pinned_voices
        pinned = {_find(name, voices, fallback=default_id) for name in named}
        voices = {
            name: replace(voice, is_default=name == default_id, is_pinned=name in pinned)
            for name, voice in voices.items()
        }
        return _Snapshot(voices, default_id, stamp)

    def _choose_default(self, voices: dict[str, Voice]) -> str:
        first = next((name for name, voice in voices.items() if voice.speaks), None)
        if first is None:
            raise ConfigError("none of the voices speaks")
        marked = [name for name, voice in voices.items() if voice.is_default]
        if self._default_voice is None:
            return marked[0] if marked and voices[marked[0]].speaks else first
        chosen = _find(self._default_voice, voices, fallback=first)
        if chosen is None:
            raise ConfigError(
                f"--default-voice {self._default_voice}: there is no such preset; {self._folder} "
                f"has {_shortened(list(voices))}, and OpenAI's names are known too"
            )
        if not voices[chosen].speaks:
            raise ConfigError(
                f"--default-voice {self._default_voice}: the model cannot speak voice {chosen!r}; "
                f"take one that it speaks, such as {first!r}"
            )
        return chosen

    def _read_voice(self, voice_id: str, entry: dict[str, Any]) -> Voice:
        language = entry.get("language") or _language_in(voice_id)
        clip, duration_s = self._read_clip(voice_id, entry)
        return Voice(
            voice_id=voice_id,
            name=entry.get("name", voice_id.replace("_", " ").title()),
            language=language,
            description=entry.get("description", ""),
            transcript=entry.get("transcript"),
            clip=clip,
            system_prompt=entry.get("system_prompt"),
            scene=entry.get("scene"),
            is_default=entry.get("default", False),
            speaks=entry.get("speaks", True),
            is_trained=entry.get("trained", False),
            max_chars=entry.get("max_chars", DEFAULT_MAX_CHARS),
            duration_s=duration_s,
            labels={"language": language},
        )

    def _read_clip(self, voice_id: str, entry: dict[str, Any]) -> tuple[PromptClip | None, float]:
        """Clip and its seconds; shipped codes of this codec go before the samples."""
        if "audio_file" not in entry:
            return None, 0.0
        path = self._folder / entry["audio_file"]
        try:
            samples, rate = self._read_audio(path)
        except OSError as error:
            raise ConfigError(f"voice {voice_id!r}: cannot read {path}: {error}") from error
        except InvalidRequestError as error:
            raise ConfigError(f"voice {voice_id!r}: {error}") from error
        if not len(samples):
            raise ConfigError(f"voice {voice_id!r}: {path} holds no audio samples")
        duration_s = len(samples) / rate
        codes = self._read_codes(voice_id, entry)
        if codes is not None:
            return PromptClip(num_frames=codes.shape[1], codes=codes), duration_s
        return self._clip_of(resample(samples, rate, self._sample_rate)), duration_s

    def _read_audio(self, path: Path) -> tuple[NDArray[np.float32], int]:
        """Mono samples and their rate; wav files need no library, others PyAV."""
        data = path.read_bytes()
        if data[:4] == b"RIFF":
            return read_wav(data, param=str(path))
        samples = decode_clip(data, sample_rate=self._sample_rate, param=str(path))
        return samples, self._sample_rate

    def _read_codes(self, voice_id: str, entry: dict[str, Any]) -> NDArray[np.int16] | None:
        """Codes int16 [num_codebooks, num_frames] shipped for this codec, if there are any."""
        if "codes_file" not in entry:
            return None
        path = self._folder / entry["codes_file"]
        by_codec = _read_object(path, f"voice {voice_id!r}")
        if self._codec_fingerprint not in by_codec:
            return None
        try:
            codes = np.array(by_codec[self._codec_fingerprint], np.int16)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"voice {voice_id!r}: {path} holds no table of codes") from error
        if codes.ndim != 2 or codes.shape[0] != self._num_codebooks or not codes.size:
            raise ConfigError(
                f"voice {voice_id!r}: codes in {path} have shape {list(codes.shape)}; "
                f"the codec needs [{self._num_codebooks}, T], T >= 1"
            )
        return codes

    def _clip_of(self, samples: NDArray[np.float32]) -> PromptClip:
        padded = pad_to_multiple(samples, self._hop_length)
        return PromptClip(num_frames=len(padded) // self._hop_length, samples=padded)


def check_presets(
    config: EngineConfig, folder: Path | None, *, default_voice: str | None = None
) -> None:
    """Find out what is wrong with presets before a model is loaded, which may take minutes.

    The embedded model is loaded at once and may bring voices along, so without a folder its names
    are left to be checked then.

    Raises:
        ConfigError: the folder or the default voice is wrong.
    """
    if folder is not None or not config.uses_embedded_model:
        VoiceLibrary.without_engine(folder, default_voice=default_voice)


def _language_in(voice_id: str) -> str:
    """Language that an id like ``zh_man`` or ``ingrid_de`` tells; English otherwise."""
    parts = voice_id.lower().split("_")
    return next((part for part in (parts[0], parts[-1]) if part in _LANGUAGES), "en")


def _list_entry(voice: Voice, *, is_upload: bool) -> dict[str, Any]:
    return {
        "id": voice.voice_id,
        "voice_id": voice.voice_id,
        "name": voice.name,
        "description": voice.description,
        "language": voice.language,
        "labels": voice.labels,
        "default": voice.is_default,
        "speaks": voice.speaks,
        "duration": round(voice.duration_s, 3),
        "uploaded": is_upload,
    }


def _without_clip(stored: StoredVoice) -> Voice:
    return Voice(
        voice_id=stored.voice_id,
        name=stored.name,
        language=stored.language,
        description=stored.description,
        transcript=stored.transcript,
        scene=stored.scene,
        duration_s=stored.duration_s,
        labels={"language": stored.language},
    )


def _shortened(names: Sequence[str]) -> str:
    """Names for a message, which a thousand of them would make unreadable."""
    shown = ", ".join(names[:_MAX_SHOWN_NAMES])
    rest = len(names) - _MAX_SHOWN_NAMES
    return f"{shown} and {rest} more (GET /v1/audio/voices)" if rest > 0 else shown


def _requested_name(voice: str | Mapping[str, Any] | None) -> str | None:
    name = voice.get("id") if isinstance(voice, Mapping) else voice
    if isinstance(name, str) or voice is None:
        return name
    raise InvalidRequestError(f'voice {voice!r} must be a name or {{"id": name}}', param="voice")


def _find(name: str, voices: Mapping[str, Voice], *, fallback: str) -> str | None:
    if name in voices:
        return name
    alias = OPENAI_VOICE_ALIASES.get(name)
    return alias if alias is None or alias in voices else fallback


def _read_entries(path: Path) -> dict[str, dict[str, Any]]:
    entries = _read_object(path, "voice presets")
    if not entries:
        raise ConfigError(f"voice presets: {path} names no voice")
    for voice_id, entry in entries.items():
        _check_entry(voice_id, entry)
    return {voice_id: _without_nulls(entry) for voice_id, entry in entries.items()}


def _without_nulls(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry without the keys that are null, which is as if they were not there."""
    return {key: value for key, value in entry.items() if value is not None}


def _check_entry(voice_id: str, entry: object) -> None:
    if not isinstance(entry, dict):
        raise ConfigError(f"voice {voice_id!r} must be an object, not {entry!r}")
    entry = _without_nulls(entry)
    for key, value in entry.items():
        if key not in _KEY_TYPES:
            raise ConfigError(
                f"voice {voice_id!r} has the unknown key {key!r}; known are {', '.join(_KEY_TYPES)}"
            )
        if type(value) is not _KEY_TYPES[key]:  # True is no number
            raise ConfigError(
                f"voice {voice_id!r}: {key}={value!r} must be a {_KEY_TYPES[key].__name__}"
            )
    if entry.get("max_chars", 1) < 1:
        raise ConfigError(f"voice {voice_id!r}: max_chars={entry['max_chars']} must be at least 1")
    if ("transcript" in entry) != ("audio_file" in entry):
        raise ConfigError(
            f"voice {voice_id!r}: transcript and audio_file go together; one is missing"
        )
    if "codes_file" in entry and "audio_file" not in entry:
        raise ConfigError(f"voice {voice_id!r}: codes_file needs the audio_file that it encodes")
    needs_sound = entry.get("speaks", True) and not entry.get("trained", False)
    if needs_sound and not entry.keys() & {"audio_file", "scene", "system_prompt"}:
        raise ConfigError(
            f"voice {voice_id!r} says nothing of its sound; "
            "give transcript and audio_file, scene or system_prompt"
        )


def _read_object(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what}: cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{what}: {path} holds a {type(content).__name__}, not an object")
    return content


def _stamp(folder: Path) -> _Stamp:
    """Name, time and size of every file below ``folder``."""
    stamp = []
    for path in sorted(folder.rglob("*")):
        try:
            status = path.stat()
        except OSError:  # gone since it was listed
            continue
        stamp.append((str(path), status.st_mtime_ns, status.st_size))
    return tuple(stamp)
