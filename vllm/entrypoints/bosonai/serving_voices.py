"""Voices over HTTP: upload by form or JSON, deletion, and the older routes for the same things.

Decides what an upload must hold and which names it may take. Where voices are kept is in
``voice_store``, what the list shows in ``voices``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile

from vllm import envs
from vllm.audio import decode_clip, parse_data_url
from vllm.entrypoints.bosonai.engine_host import EngineClient, EngineHost
from vllm.entrypoints.bosonai.voice_prefill import prefill_voice
from vllm.entrypoints.bosonai.voice_store import (
    FolderFiles,
    StoredVoice,
    VoiceFiles,
    VoiceStore,
    id_of_name,
    new_id,
)
from vllm.entrypoints.openai.errors import read_body
from vllm.entrypoints.openai.protocol import Text
from vllm.entrypoints.openai.reply_bodies import (
    DeletedVoice,
    PromptId,
    Removal,
    VoiceList,
    VoiceObject,
)
from vllm.entrypoints.openai.reply_docs import Replies, error_replies, json_reply
from vllm.entrypoints.server_config import BUCKET_SCHEME, NO_STORE
from vllm.exceptions import (
    ConfigError,
    InvalidRequestError,
    VoiceConflictError,
    VoiceForbiddenError,
)

if TYPE_CHECKING:
    from vllm.entrypoints.bosonai.voices import VoiceLibrary
    from vllm.entrypoints.server_config import ServerConfig

__all__ = [
    "MULTIPART_PATHS",
    "AddPromptRequest",
    "RemovePromptRequest",
    "VoiceUpload",
    "add_voice_routes",
    "open_store",
]

MULTIPART_PATHS = frozenset({"/v1/audio/voices", "/voices"})

_MAX_SAMPLE_BYTES = 10 * 2**20
_MIN_SECONDS, _MAX_SECONDS = 0.5, 30.0
_MAX_FORM_FIELDS = 32
_TRANSCRIPT_SPELLINGS = ("transcript", "ref_text", "reference_text")


class VoiceUpload(BaseModel):
    """Body of ``POST /v1/audio/voices``; in a form, ``audio_sample`` is a file."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: Text = Field(description="becomes the id, without blanks and accents")
    type: Literal["audio_sample", "prompt"] = "audio_sample"
    audio_sample: str | bytes | None = Field(
        None, description="clip to clone, up to 10 MiB and 30 s; base64 or a data URL in JSON"
    )
    transcript: Text | None = Field(None, max_length=2000, description="of audio_sample")
    ref_text: Text | None = Field(None, max_length=2000)
    reference_text: Text | None = Field(None, max_length=2000)
    prompt: Text | None = Field(
        None, max_length=2000, description="for type prompt: what the voice sounds like"
    )
    consent: Text | None = Field(
        None, max_length=2000, description="the speaker's consent; kept with the voice"
    )
    language: str = Field("en", pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$", max_length=35)
    description: Text = Field("", max_length=500)

    @property
    def words(self) -> str:
        """The transcript, however it was spelt; empty without one."""
        given = [getattr(self, name) for name in _TRANSCRIPT_SPELLINGS]
        return next((text.strip() for text in given if text and text.strip()), "")


class AddPromptRequest(BaseModel):
    """Body of ``POST /add_prompt``."""

    model_config = ConfigDict(strict=True, extra="ignore")

    wav_base64: str
    wav_format: str | None = Field(None, description="not needed: the file says what it is")
    prompt_text: Annotated[Text, Field(min_length=1, max_length=2000)]


class RemovePromptRequest(BaseModel):
    """Body of ``POST /remove_prompt``."""

    model_config = ConfigDict(strict=True, extra="ignore")

    prompt_id: str = Field(min_length=1, max_length=64)


def _upload_docs() -> dict[str, Any]:
    """Both forms of an upload, for the OpenAPI document."""
    schema = VoiceUpload.model_json_schema()
    fields = schema["properties"]
    audio = {"type": "string", "description": fields["audio_sample"]["description"]}
    as_json = {**fields, "audio_sample": {**audio, "type": ["string", "null"]}}
    # a text that may be null is, in a form, the first of its kinds
    in_form = {name: field.get("anyOf", [field])[0] for name, field in fields.items()}
    in_form["audio_sample"] = {**audio, "format": "binary"}
    contents = {"application/json": as_json, "multipart/form-data": in_form}
    return {
        "requestBody": {
            "required": True,
            "content": {
                kind: {
                    "schema": {
                        "type": "object",
                        "required": schema["required"],
                        "properties": properties,
                    }
                }
                for kind, properties in contents.items()
            },
        }
    }


_UPLOAD_BODY = _upload_docs()
_UPLOAD_REPLIES: Replies = {
    **json_reply(VoiceObject, "The voice may be used at once"),
    **error_replies(400, 403, 409, 503),
}
_LIST_ERRORS = error_replies(503)
_DELETION_ERRORS = error_replies(400, 403, 404, 503)


class _VoiceKeeper:
    """Checks uploads, keeps them, and has the engine encode them."""

    def __init__(self, host: EngineHost, clips: ThreadPoolExecutor) -> None:
        self._host = host
        self._clips = clips
        self._warming: set[asyncio.Task[None]] = set()

    async def create(self, upload: VoiceUpload) -> StoredVoice:
        """Keep a new voice under an id made from its name."""
        voice_id = id_of_name(upload.name)
        if await asyncio.to_thread(_library(self._host).is_preset, voice_id):
            raise VoiceConflictError(
                f"the name {voice_id!r} belongs to a voice of this server; take another one"
            )
        if upload.type == "prompt":
            return await self._create_prompt(upload, voice_id)
        if upload.audio_sample is None:
            raise InvalidRequestError(
                "audio_sample is missing; send a clip, or type=prompt with a prompt",
                param="audio_sample",
            )
        if not upload.words:
            raise InvalidRequestError(
                "transcript is missing: a clip is cloned together with the words it says; "
                "send them as transcript or ref_text",
                param="transcript",
            )
        return await self.keep_clip(
            upload.audio_sample, "audio_sample", voice_id=voice_id, upload=upload
        )

    async def _create_prompt(self, upload: VoiceUpload, voice_id: str) -> StoredVoice:
        if not (upload.prompt or "").strip():
            raise InvalidRequestError(
                "prompt is missing; say what the voice sounds like", param="prompt"
            )
        voice = _record(upload, voice_id, scene=upload.prompt)
        await self._change(voice_id, self._writable().add, voice, None, 0)
        return voice

    async def keep_clip(
        self, clip: str | bytes, param: str, *, voice_id: str, upload: VoiceUpload
    ) -> StoredVoice:
        """Decode a clip and keep it as a voice; ``param`` is the field that held it."""
        engine = self._host.ready_engine()
        info = engine.info
        assert info is not None, "a ready engine has its info"
        if not info.can_encode:
            raise InvalidRequestError(
                f"{param} is not possible with this model: its codec cannot encode", param=param
            )
        rate, store = info.sample_rate, self._writable()
        loop = asyncio.get_running_loop()
        samples = await loop.run_in_executor(self._clips, _decode, clip, param, rate)
        voice = _record(upload, voice_id, transcript=upload.words, duration_s=len(samples) / rate)
        await self._change(voice_id, store.add, voice, samples, rate)
        self._warm(engine, voice_id)
        return voice

    async def delete(self, voice_id: str) -> None:
        """Remove an upload; shipped voices stay."""
        if await asyncio.to_thread(_library(self._host).is_preset, voice_id):
            raise VoiceForbiddenError(
                f"voice {voice_id!r} belongs to this server and cannot be deleted"
            )
        await self._change(voice_id, self._writable().delete, voice_id)

    async def voices(self) -> list[dict[str, Any]]:
        """What ``GET /v1/audio/voices`` shows."""
        library = _library(self._host)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(library.store_threads, library.list)

    async def _change(self, voice_id: str, change: Callable[..., None], *args: Any) -> None:
        """Change one voice of the store; this server then looks at it anew."""
        library = _library(self._host)
        try:
            await asyncio.get_running_loop().run_in_executor(library.store_threads, change, *args)
        finally:
            library.forget(voice_id)

    def _writable(self) -> VoiceStore:
        store = _library(self._host).store
        if store is None:
            raise VoiceForbiddenError("this server keeps no uploaded voices (--voice-store none)")
        return store

    def _warm(self, engine: EngineClient, voice_id: str) -> None:
        """Encode the clip and prefill its prompt now, so that the first request need not wait."""
        task = asyncio.create_task(prefill_voice(engine, voice_id))
        self._warming.add(task)
        task.add_done_callback(self._warming.discard)


def _library(host: EngineHost) -> VoiceLibrary:
    voices = host.ready_engine().voices
    assert voices is not None, "a ready engine has its voices"
    return voices


def open_store(config: ServerConfig) -> VoiceStore | None:
    """The store that the flags name; None if the server keeps no uploads.

    Raises:
        ConfigError: it is a bucket, and the package or the settings for it are missing.
    """
    place = config.voice_store
    if place == NO_STORE:
        return None
    files: VoiceFiles
    if place is not None and place.startswith(BUCKET_SCHEME):
        files = _open_bucket(place)
    else:
        files = FolderFiles(Path(place).expanduser() if place else envs.VLLM_CACHE_ROOT / "voices")
    return VoiceStore(files, max_voices=config.max_stored_voices)


def _open_bucket(url: str) -> VoiceFiles:
    """The files of ``s3://bucket/prefix``; loads a package that other servers do without."""
    try:
        from vllm.entrypoints.bosonai.voice_bucket import BucketFiles
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--voice-store {url} needs the package {error.name}: "
            "pip install 'higgs-audio-vllm[s3]'"
        ) from error
    bucket, _, prefix = url.removeprefix(BUCKET_SCHEME).partition("/")
    return BucketFiles(bucket, prefix.strip("/"))


def add_voice_routes(app: FastAPI, host: EngineHost, clips: ThreadPoolExecutor) -> None:
    """Add the routes that list and change voices.

    Args:
        app: to add to.
        host: of the engine whose voices are listed and changed.
        clips: threads that decode clips.
    """
    keeper = _VoiceKeeper(host, clips)
    _add_openai_routes(app, keeper)
    _add_older_routes(app, keeper)


def _add_openai_routes(app: FastAPI, keeper: _VoiceKeeper) -> None:
    @app.get("/v1/audio/voices", responses={**json_reply(VoiceList), **_LIST_ERRORS})
    async def list_voices() -> dict[str, Any]:
        """Presets first, then uploads."""
        return {"object": "list", "voices": await keeper.voices()}

    @app.post("/v1/audio/voices", responses=_UPLOAD_REPLIES, openapi_extra=_UPLOAD_BODY)
    async def create_voice(raw: Request) -> dict[str, Any]:
        """Keep a clip or a description as a voice."""
        return _voice_object(await keeper.create(await _read_upload(raw)))

    @app.delete(
        "/v1/audio/voices/{voice_id}",
        responses={**json_reply(DeletedVoice), **_DELETION_ERRORS},
    )
    async def delete_voice(voice_id: str) -> dict[str, Any]:
        """Remove an uploaded voice."""
        await keeper.delete(voice_id)
        return {"id": voice_id, "object": "audio.voice.deleted", "deleted": True}


def _add_older_routes(app: FastAPI, keeper: _VoiceKeeper) -> None:
    @app.get("/voices", responses={**json_reply(list[str]), **_LIST_ERRORS})
    async def list_names() -> list[str]:
        """Ids alone."""
        return [voice["id"] for voice in await keeper.voices()]

    @app.post("/voices", responses=_UPLOAD_REPLIES, openapi_extra=_UPLOAD_BODY)
    async def create_voice_here(raw: Request) -> dict[str, Any]:
        """The same as ``POST /v1/audio/voices``."""
        return _voice_object(await keeper.create(await _read_upload(raw)))

    @app.post(
        "/add_prompt",
        responses={**json_reply(PromptId), **error_replies(400, 403, 409, 503)},
    )
    async def add_prompt(body: AddPromptRequest) -> dict[str, str]:
        """Keep a clip as a voice without a name; its id may be sent as ``voice``."""
        if not body.prompt_text.strip():
            raise InvalidRequestError(
                "prompt_text is empty; give the words of the clip", param="prompt_text"
            )
        prompt_id = new_id()
        upload = VoiceUpload.model_validate({"name": prompt_id, "transcript": body.prompt_text})
        await keeper.keep_clip(body.wav_base64, "wav_base64", voice_id=prompt_id, upload=upload)
        return {"prompt_id": prompt_id}

    @app.post("/remove_prompt", responses={**json_reply(Removal), **_DELETION_ERRORS})
    async def remove_prompt(body: RemovePromptRequest) -> dict[str, str]:
        """Remove what ``/add_prompt`` kept."""
        await keeper.delete(body.prompt_id)
        return {"status": "ok"}


async def _read_upload(raw: Request) -> VoiceUpload:
    """The body, from a form or from JSON."""
    kind = raw.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        fields = await _json_fields(raw)
    else:
        fields = await _form_fields(raw)
    return read_body(VoiceUpload, fields)


async def _json_fields(raw: Request) -> Any:
    try:
        return await raw.json()
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error


async def _form_fields(raw: Request) -> Mapping[str, Any]:
    """Text fields as text, the clip as bytes; a damaged form is a 400 of Starlette's."""
    fields: dict[str, Any] = {}
    async with raw.form(max_files=2, max_fields=_MAX_FORM_FIELDS) as form:
        for name, value in form.items():
            if isinstance(value, UploadFile):
                fields[name] = await value.read(_MAX_SAMPLE_BYTES + 1)
            elif value or name == "name":  # an empty field of a form is one left blank
                fields[name] = value
    return fields


def _record(upload: VoiceUpload, voice_id: str, **more: Any) -> StoredVoice:
    return StoredVoice(
        voice_id=voice_id,
        name=upload.name.strip(),
        kind=upload.type,
        created_at=int(time.time()),
        version=new_id(),
        language=upload.language,
        description=upload.description,
        consent=upload.consent,
        **more,
    )


def _voice_object(voice: StoredVoice) -> dict[str, Any]:
    return {
        "id": voice.voice_id,
        "object": "audio.voice",
        "name": voice.name,
        "created_at": voice.created_at,
        "type": voice.kind,
        "voice_id": voice.voice_id,
        "language": voice.language,
        "description": voice.description,
        "duration": round(voice.duration_s, 3),
    }


def _decode(clip: str | bytes, param: str, sample_rate: int) -> NDArray[np.float32]:
    """Samples [num_samples] of a clip of allowed size, length and format."""
    data = parse_data_url(clip, param=param) if isinstance(clip, str) else clip
    samples = decode_clip(
        data,
        sample_rate=sample_rate,
        max_seconds=_MAX_SECONDS,
        max_bytes=_MAX_SAMPLE_BYTES,
        param=param,
    )
    if len(samples) < _MIN_SECONDS * sample_rate:
        raise InvalidRequestError(
            f"{param} lasts {len(samples) / sample_rate:.2f} s; at least {_MIN_SECONDS} s are needed",
            param=param,
        )
    return samples
