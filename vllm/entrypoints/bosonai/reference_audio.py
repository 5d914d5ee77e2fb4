"""Clips that a request brings along: data URLs, base64, and URLs where the server allows them.

Fetches and decodes on the thread pool. What a clip may be is decided by ``vllm.audio.reference``.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector

import numpy as np
from numpy.typing import NDArray

from vllm import envs
from vllm.audio import decode_clip, parse_data_url
from vllm.exceptions import InvalidRequestError

if TYPE_CHECKING:
    from vllm.entrypoints.cli_args import ServerConfig
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
        opener = OpenerDirector()  # follows no redirects and knows no other schemes
        opener.add_handler(HTTPHandler())
        opener.add_handler(HTTPSHandler())
        limit = self._config.max_body_bytes
        try:
            with opener.open(url, timeout=envs.VLLM_AUDIO_FETCH_TIMEOUT) as reply:
                data: bytes = reply.read(limit + 1) if reply.status == 200 else b""
        except (URLError, OSError, ValueError) as error:
            raise InvalidRequestError(
                f"ref_audio could not be fetched: {error}", param=_PARAM
            ) from error
        if not data or len(data) > limit:
            problem = "is too large" if data else f"answered with status {reply.status}"
            raise InvalidRequestError(f"ref_audio could not be fetched: it {problem}", param=_PARAM)
        return data

    def _read_file(self, url: str) -> bytes:
        folder = self._config.allowed_local_media_path
        if folder is None:
            raise InvalidRequestError(
                "ref_audio: this server reads no file URLs (--allowed-local-media-path)",
                param=_PARAM,
            )
        path = Path(unquote(urlsplit(url).path)).resolve()
        if not path.is_relative_to(Path(folder).resolve()) or not path.is_file():
            raise InvalidRequestError(
                "ref_audio names no file below the folder that this server allows", param=_PARAM
            )
        return path.read_bytes()
