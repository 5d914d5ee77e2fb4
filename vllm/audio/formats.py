"""The table of audio formats that a reply can have.

Knows names, media types and codec settings; the bytes are made in ``vllm.audio.encode``.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.exceptions import InvalidRequestError

__all__ = ["FORMATS", "AudioFormat", "lookup"]


@dataclass(frozen=True)
class AudioFormat:
    """One format of a reply. Every format can be streamed.

    ``container`` and ``codec`` are libav's names of the muxer and the encoder, ``sample_format``
    is what that encoder takes; all three are None where no library is needed. ``bit_rate`` is in
    bit/s, None for a lossless format.
    """

    name: str
    media_type: str
    container: str | None = None
    codec: str | None = None
    sample_format: str | None = None
    bit_rate: int | None = None


FORMATS: dict[str, AudioFormat] = {  # name -> AudioFormat
    fmt.name: fmt
    for fmt in (
        AudioFormat("mp3", "audio/mpeg", "mp3", "libmp3lame", "fltp", 128_000),
        AudioFormat("opus", "audio/opus", "ogg", "libopus", "flt", 48_000),
        AudioFormat("aac", "audio/aac", "adts", "aac", "fltp", 96_000),
        AudioFormat("flac", "audio/flac", "flac", "flac", "s16"),
        AudioFormat("wav", "audio/wav"),
        AudioFormat("pcm", "audio/pcm"),
    )
}


def lookup(name: str, *, param: str = "response_format") -> AudioFormat:
    """Format by its name in requests.

    Raises:
        InvalidRequestError: no such format; ``param`` is the field that is blamed.
    """
    fmt = FORMATS.get(name)
    if fmt is None:
        raise InvalidRequestError(
            f"{param} {name!r} is not supported; use one of {', '.join(FORMATS)}", param=param
        )
    return fmt
