"""Reference clips from outside: bytes of any audio file to bounded mono samples.

Plain wav is read with numpy alone, everything else with PyAV. Knows nothing of voices, and
opens nothing that the bytes might point to.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vllm.audio.resample import downmix, resample
from vllm.exceptions import InvalidRequestError

if TYPE_CHECKING:
    from av.container import InputContainer

__all__ = ["decode_clip", "pad_to_multiple", "parse_data_url", "read_wav"]

_PARAM = "ref_audio"
_MAX_BYTES = 16 * 1024 * 1024
_MIN_RATE_HZ, _MAX_RATE_HZ = 4_000, 384_000

# Containers that hold their audio themselves. Playlists and scripts (hls, concat, dash) would
# make libav open files and addresses of the sender's choice.
_CONTAINERS = (
    "wav,w64,aiff,au,caf,flac,mp3,ogg,aac,ac3,eac3,amr,ape,wv,tta,matroska,webm,mov,mp4,m4a,asf"
)

_PCM_TAG, _FLOAT_TAG, _EXTENSIBLE_TAG = 1, 3, 0xFFFE


class _UnusableClipError(Exception):
    """Why a clip cannot be used; what it is called is added at the edge of this module."""


def decode_clip(
    data: bytes,
    *,
    sample_rate: int,
    max_seconds: float = 30.0,
    max_bytes: int = _MAX_BYTES,
    pad_to: int = 1,
    param: str = _PARAM,
) -> NDArray[np.float32]:
    """Decode one clip to mono at ``sample_rate`` Hz.

    Args:
        data: a whole audio file: wav, flac, mp3, ogg, m4a, webm and others, any rate, any
            number of channels (their mean is taken).
        sample_rate: wanted rate in Hz.
        max_seconds: longer clips are refused; decoding stops there.
        max_bytes: larger files are refused unread.
        pad_to: zeros are added at the end up to a multiple of this many samples.
        param: the field or file that is blamed.

    Returns:
        float32 [num_samples], a multiple of ``pad_to``, at least 1.

    Raises:
        InvalidRequestError: empty, too large, too long, or not audio.
    """
    try:
        samples, rate = _decode_checked(data, max_seconds, max_bytes)
    except _UnusableClipError as error:
        raise InvalidRequestError(f"{param} {error}", param=param) from None
    return pad_to_multiple(resample(samples, rate, sample_rate), pad_to)


def _decode_checked(
    data: bytes, max_seconds: float, max_bytes: int
) -> tuple[NDArray[np.float32], int]:
    """Mono samples of a clip that is neither empty nor too much, and their rate."""
    if not data:
        raise _UnusableClipError("is empty; send a whole audio file")
    if len(data) > max_bytes:
        raise _UnusableClipError(f"has {len(data)} bytes; at most {max_bytes} are allowed")
    samples, rate = _decode(data, max_seconds)
    if not len(samples):
        raise _UnusableClipError("holds no audio samples")
    if not _MIN_RATE_HZ <= rate <= _MAX_RATE_HZ:
        raise _UnusableClipError(f"has {rate} Hz; allowed are {_MIN_RATE_HZ} to {_MAX_RATE_HZ} Hz")
    if len(samples) > max_seconds * rate:
        raise _too_long(max_seconds)
    if not np.isfinite(samples).all():
        raise _UnusableClipError("holds samples that are not finite numbers")
    return samples, rate


def pad_to_multiple(samples: NDArray[np.float32], multiple: int) -> NDArray[np.float32]:
    """Samples [n] with zeros at the end up to a multiple of ``multiple``."""
    return np.pad(samples, (0, -len(samples) % multiple))


def parse_data_url(text: str, *, param: str = _PARAM) -> bytes:
    """Bytes of a base64 data URL (``data:audio/wav;base64,...``) or of bare base64.

    Raises:
        InvalidRequestError: not base64; ``param`` is the field that is blamed.
    """
    payload = text.strip()
    if payload[:5].lower() == "data:":
        head, comma, payload = payload.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidRequestError(
                f"{param} {head[:80]!r} is not a base64 data URL;"
                " use data:audio/wav;base64,... or bare base64",
                param=param,
            )
    try:
        data = base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(
            f"{param} is not valid base64 ({error}); it starts with {payload[:24]!r}",
            param=param,
        ) from None
    if not data:
        raise InvalidRequestError(f"{param} is empty; send a whole audio file", param=param)
    return data


def read_wav(source: str | Path | bytes, *, param: str = _PARAM) -> tuple[NDArray[np.float32], int]:
    """Read a wav file without any library: 8, 16, 24, 32-bit integer or 32-bit float.

    Chunks may come in any order and unknown ones are passed over; a data chunk that is cut off
    or states an unknown length ends with the file. Channels are averaged.

    Returns:
        float32 [num_samples] in [-1, 1], and the rate in Hz.

    Raises:
        InvalidRequestError: not such a file; ``param`` is the field or file that is blamed.
        OSError: the path cannot be read.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        return _parse_wav(data)
    except _UnusableClipError as error:
        raise InvalidRequestError(f"{param} {error}", param=param) from None


def _parse_wav(data: bytes) -> tuple[NDArray[np.float32], int]:
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise _UnusableClipError("is not a wav file (no RIFF/WAVE header)")
    chunks = dict(_riff_chunks(data))
    if b"fmt " not in chunks or b"data" not in chunks:
        raise _UnusableClipError("is a wav file without a 'fmt ' or 'data' chunk")
    tag, channels, rate, bits = _parse_wav_format(chunks[b"fmt "])
    frame_bytes = channels * bits // 8
    body = chunks[b"data"]
    body = body[: len(body) - len(body) % frame_bytes]
    return downmix(_wav_values(body, tag, bits).reshape(-1, channels)), rate


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    view = memoryview(data)
    start = 12
    while start + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, start)
        yield name, view[start + 8 : start + 8 + size]
        start += 8 + size + size % 2


def _parse_wav_format(chunk: memoryview) -> tuple[int, int, int, int]:
    """Format tag, channels, rate in Hz and bits per sample of a ``fmt `` chunk."""
    if len(chunk) < 16:
        raise _UnusableClipError(
            f"is a wav file with a 'fmt ' chunk of {len(chunk)} bytes; 16 are needed"
        )
    tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunk)
    if tag == _EXTENSIBLE_TAG and len(chunk) >= 26:
        (tag,) = struct.unpack_from("<H", chunk, 24)  # first field of the sub-format's GUID
    allowed = {_PCM_TAG: (8, 16, 24, 32), _FLOAT_TAG: (32,)}.get(tag, ())
    if bits not in allowed or not channels or not rate:
        raise _UnusableClipError(
            f"is a wav file of format tag {tag}, {bits} bits, {channels} channels, {rate} Hz;"
            " read without PyAV are 8, 16, 24, 32-bit integer and 32-bit float"
        )
    return tag, channels, rate, bits


def _wav_values(body: memoryview, tag: int, bits: int) -> NDArray[np.float32]:
    if tag == _FLOAT_TAG:
        return np.frombuffer(body, "<f4").astype(np.float32)
    if bits == 8:  # the only unsigned one
        return (np.frombuffer(body, np.uint8).astype(np.float32) - 128.0) / 128.0
    if bits == 24:
        wide = np.zeros((len(body) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(body, np.uint8).reshape(-1, 3)
        return _scaled(wide.view("<i4").reshape(-1), 32)
    return _scaled(np.frombuffer(body, f"<i{bits // 8}"), bits)


def _scaled(values: NDArray[np.signedinteger], bits: int) -> NDArray[np.float32]:
    return (values / 2.0 ** (bits - 1)).astype(np.float32)


def _decode(data: bytes, max_seconds: float) -> tuple[NDArray[np.float32], int]:
    """Mono samples and their rate, by numpy where it is a plain wav, else by PyAV."""
    if data[:4] == b"RIFF":
        try:
            return _parse_wav(data)
        except _UnusableClipError:
            pass  # a compressed or damaged wav: PyAV may know it
    return _decode_with_av(data, max_seconds)


def _decode_with_av(data: bytes, max_seconds: float) -> tuple[NDArray[np.float32], int]:
    try:
        import av
    except ImportError:
        raise _UnusableClipError(
            "is not a plain wav file, and other formats need PyAV (pip install av)"
        ) from None

    options = {"format_whitelist": _CONTAINERS}
    try:
        with av.open(io.BytesIO(data), "r", container_options=options) as container:
            return _decode_container(container, max_seconds)
    except (av.FFmpegError, ValueError) as error:
        raise _UnusableClipError(f"cannot be decoded as audio ({error})") from None


def _decode_container(
    container: InputContainer, max_seconds: float
) -> tuple[NDArray[np.float32], int]:
    import av

    if not container.streams.audio:
        raise _UnusableClipError("holds no audio stream")
    stream = container.streams.audio[0]
    to_float = av.AudioResampler(format="fltp")
    parts: list[NDArray[np.float32]] = []
    num_samples = rate = num_broken = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            num_broken += 1  # a file cut out of a stream begins or ends within a packet
            continue
        for frame in frames:
            rate = frame.sample_rate
            num_samples += frame.samples
            if num_samples > max_seconds * rate:
                raise _too_long(max_seconds)
            planes = [out.to_ndarray() for out in to_float.resample(frame)]  # [channels, n]
            parts += [downmix(np.asarray(plane.T, np.float32)) for plane in planes]
    if num_broken > len(parts):
        raise _UnusableClipError("is damaged, or not audio")
    return (np.concatenate(parts) if parts else np.zeros(0, np.float32)), rate


def _too_long(max_seconds: float) -> _UnusableClipError:
    return _UnusableClipError(f"is longer than {max_seconds:g} seconds, the most that is allowed")
