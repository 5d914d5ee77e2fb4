"""Clips that a request brings along: data URLs, base64, and URLs where the server allows them.

Fetches and decodes on the thread pool. What a clip may be is decided by ``vllm.audio.reference``.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from vllm import envs
from vllm.audio import decode_clip, parse_data_url
from vllm.entrypoints.bosonai.safe_fetch import FetchError, fetch
from vllm.exceptions import InvalidRequestError

if TYPE_CHECKING:
    from vllm.entrypoints.server_config import ServerConfig
    from vllm.v1.engine.messages import EngineInfo

__all__ = ["ReferenceAudioLoader"]

_PARAM = "ref_audio"


class ReferenceAudioLoader:
    """Turns the ``ref_audio`` field into samples at the codec's rate."""

    def __init__(self, config: ServerConfig, pool: ThreadPoolExecutor) -> None:
        self._config = config
        self._pool = pool

    async def load(self, text: str, info: EngineInfo) -> NDArray[np.float32]:
        """Samples of a clip, float32 [num_samples], mono, at ``info.sample_rate``.

        Raises:
            InvalidRequestError: the clip cannot be had, read or used.
        """
        if not info.can_encode:
            raise InvalidRequestError(
                "ref_audio is not possible with this model: its codec cannot encode; "
                "use a voice of GET /v1/audio/voices",
                param=_PARAM,
            )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._load, text, info)

    def _load(self, text: str, info: EngineInfo) -> NDArray[np.float32]:
        data = self._read(text)
        return decode_clip(data, sample_rate=info.sample_rate, pad_to=info.hop_length)

    def _read(self, text: str) -> bytes:
        scheme = text[:8].partition(":")[0].lower()
        if scheme in ("http", "https"):
            return self._fetch(text)
        if scheme == "file":
            return self._read_file(text)
        return parse_data_url(text)

    def _fetch(self, url: str) -> bytes:
        if not self._config.allow_ref_audio_urls:
            raise InvalidRequestError(
                "ref_audio: this server fetches no URLs (--allow-ref-audio-urls); "
                "send the clip as base64",
                param=_PARAM,
            )
        try:
            return fetch(
                url,
                max_bytes=self._config.max_body_bytes,
                timeout_s=envs.VLLM_AUDIO_FETCH_TIMEOUT,
                allow_private=self._config.allow_private_ref_audio_urls,
            )
        except FetchError as error:
            raise InvalidRequestError(
                f"ref_audio could not be fetched: {error}", param=_PARAM
            ) from error

    def _read_file(self, url: str) -> bytes:
        folder = self._config.allowed_local_media_path
        if folder is None:
            raise InvalidRequestError(
                "ref_audio: this server reads no file URLs (--allowed-local-media-path)",
                param=_PARAM,
            )
        limit = self._config.max_body_bytes
        try:
            parts = urlsplit(url)
            path = Path(unquote(parts.path)).resolve()
            is_inside = path.is_relative_to(Path(folder).resolve())
            is_local = parts.netloc in ("", "localhost")
            if is_inside and is_local and path.is_file() and path.stat().st_size <= limit:
                return path.read_bytes()
        except (OSError, ValueError, RuntimeError):  # names too long, zero bytes, circles of links
            pass
        raise InvalidRequestError(
            "ref_audio names no readable file of allowed size below the folder that this server "
            "allows",
            param=_PARAM,
        )
