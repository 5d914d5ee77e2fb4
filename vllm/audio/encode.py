"""Encoders from float samples to the bytes of one audio file, streamed or complete.

One encoder makes one file, and equal samples give equal bytes however they were cut into calls.
Knows nothing of requests and of threads; a call may take milliseconds of work.
"""

from __future__ import annotations

import io
import struct
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vllm.audio.blocks import BlockBuffer
from vllm.audio.formats import AudioFormat

if TYPE_CHECKING:
    import soxr

__all__ = ["StreamEncoder", "encode_all", "make_encoder"]

_UNKNOWN_SIZE = 0xFFFFFFFF  # in a RIFF header: the length is not known yet
_BLOCK_S = 0.02  # step of the rate converter


class StreamEncoder(ABC):
    """Encoder of one mono file. Joined in order, all returned bytes are the file."""

    @abstractmethod
    def encode(self, samples: NDArray[np.float32]) -> bytes:
        """Take samples [n] in [-1, 1] (clipped beyond).

        Returns:
            All bytes that are final by now when streaming (at most one codec frame and the
            codec's own look-ahead are held back); nothing when the file is made as a whole.
        """

    @abstractmethod
    def finish(self) -> bytes:
        """Rest of the file, or all of it when not streaming. The encoder is spent afterwards."""


def make_encoder(fmt: AudioFormat, sample_rate: int, *, streaming: bool) -> StreamEncoder:
    """Encoder for one reply.

    Args:
        fmt: row of the format table.
        sample_rate: of the samples, in Hz. The file has the same rate, or the next higher one
            that the codec supports.
        streaming: bytes as early as possible, with headers that state no length; otherwise the
            complete file with true lengths comes from ``finish``.
    """
    if fmt.name == "pcm":
        return _PcmEncoder()
    if fmt.name == "wav":
        return _WavEncoder(sample_rate, streaming=streaming)
    return _ContainerEncoder(fmt, sample_rate, streaming=streaming)


def encode_all(samples: NDArray[np.float32], fmt: AudioFormat, sample_rate: int) -> bytes:
    """Samples [n] as one complete file with true lengths."""
    encoder = make_encoder(fmt, sample_rate, streaming=False)
    return encoder.encode(samples) + encoder.finish()


class _PcmEncoder(StreamEncoder):
    """Signed 16-bit little-endian samples without any header."""

    def encode(self, samples: NDArray[np.float32]) -> bytes:
        return _to_int16(samples).tobytes()

    def finish(self) -> bytes:
        return b""


class _WavEncoder(StreamEncoder):
    """A 44-byte RIFF header and 16-bit samples, nothing behind them."""

    def __init__(self, sample_rate: int, *, streaming: bool) -> None:
        self._sample_rate = sample_rate
        self._streaming = streaming
        self._header_sent = False
        self._held: list[bytes] = []

    def encode(self, samples: NDArray[np.float32]) -> bytes:
        data = _to_int16(samples).tobytes()
        if self._streaming:
            return self._open_header() + data
        self._held.append(data)
        return b""

    def finish(self) -> bytes:
        if self._streaming:
            return self._open_header()
        data = b"".join(self._held)
        self._held.clear()
        return _wav_header(self._sample_rate, len(data)) + data

    def _open_header(self) -> bytes:
        if self._header_sent:
            return b""
        self._header_sent = True
        return _wav_header(self._sample_rate, None)


class _ContainerEncoder(StreamEncoder):
    """Codec and muxer of libav, fed with whole codec frames."""

    def __init__(self, fmt: AudioFormat, sample_rate: int, *, streaming: bool) -> None:
        import av
        from av.codec.context import Flags

        assert fmt.container is not None
        assert fmt.codec is not None
        assert fmt.sample_format is not None
        self._sample_format = fmt.sample_format
        self._sink: _Pipe | io.BytesIO = _Pipe() if streaming else io.BytesIO()
        self._container = av.open(
            self._sink,
            "w",
            format=fmt.container,
            options=_muxer_options(fmt.container, streaming=streaming),
        )
        self._rate = _codec_rate(fmt.codec, sample_rate)
        self._converter = _RateConverter(sample_rate, self._rate)
        stream = self._container.add_stream(fmt.codec, rate=self._rate, layout="mono")
        assert isinstance(stream, av.AudioStream)
        self._stream = stream
        context = stream.codec_context
        context.format = fmt.sample_format
        context.thread_count = 1
        context.flags |= Flags.bitexact  # AAC would carry the library's version otherwise
        if fmt.bit_rate is not None:
            context.bit_rate = fmt.bit_rate
        self._container.start_encoding()
        self._blocks = BlockBuffer(context.frame_size)
        self._num_samples = 0

    def encode(self, samples: NDArray[np.float32]) -> bytes:
        for block in self._blocks.push(self._converter.push(samples)):
            self._encode_block(block)
        return self._take()

    def finish(self) -> bytes:
        for block in self._blocks.push(self._converter.flush()):
            self._encode_block(block)
        rest = self._blocks.flush()
        if len(rest):
            self._encode_block(rest)
        for packet in self._stream.encode(None):
            self._container.mux(packet)
        self._container.close()
        return self._sink.getvalue() if isinstance(self._sink, io.BytesIO) else self._sink.take()

    def _encode_block(self, block: NDArray[np.float32]) -> None:
        from av import AudioFrame

        values = _to_int16(block) if self._sample_format == "s16" else np.clip(block, -1.0, 1.0)
        frame = AudioFrame.from_ndarray(
            values[np.newaxis], format=self._sample_format, layout="mono"
        )
        frame.sample_rate = self._rate
        frame.pts = self._num_samples  # the muxer learns the true end from the last one
        self._num_samples += len(block)
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    def _take(self) -> bytes:
        return self._sink.take() if isinstance(self._sink, _Pipe) else b""


class _Pipe:
    """File object that can only be written; without ``seek`` muxers leave headers as they are."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        """Everything written since the last call."""
        data = bytes(self._data)
        self._data.clear()
        return data


class _RateConverter:
    """Stateful rate conversion for codecs that do not know the model's rate; else a bypass."""

    def __init__(self, src_hz: int, dst_hz: int) -> None:
        self._blocks = BlockBuffer(max(1, round(src_hz * _BLOCK_S)))
        self._soxr: soxr.ResampleStream | None = None
        if src_hz != dst_hz:
            import soxr

            self._soxr = soxr.ResampleStream(src_hz, dst_hz, 1, dtype="float32", quality="HQ")

    def push(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._soxr is None:
            return samples
        done = [self._soxr.resample_chunk(block) for block in self._blocks.push(samples)]
        return np.concatenate([np.zeros(0, np.float32), *done])

    def flush(self) -> NDArray[np.float32]:
        rest = self._blocks.flush()
        if self._soxr is None:
            return rest
        return np.asarray(self._soxr.resample_chunk(rest, last=True), np.float32)


def _muxer_options(container: str, *, streaming: bool) -> dict[str, str]:
    """No version, time or random number in the file; when streaming, no delay and no length."""
    options = {"fflags": "+bitexact"}
    if container == "mp3":
        options["id3v2_version"] = "0"
    if container == "flac":
        options["metadata_header_padding"] = "0"  # 8 KiB by default
    if container == "ogg":
        options["serial_offset"] = "1"
    if streaming:
        options["flush_packets"] = "1"
        if container == "mp3":
            options["write_xing"] = "0"
        if container == "ogg":
            options["page_duration"] = "20000"  # microseconds; one packet per page
    return options


def _codec_rate(codec: str, sample_rate: int) -> int:
    """The rate itself where the codec has it, else the next higher one, else its highest."""
    import av

    rates = av.Codec(codec, "w").audio_rates
    if not rates:
        return sample_rate
    return min((rate for rate in rates if rate >= sample_rate), default=max(rates))


def _wav_header(sample_rate: int, num_bytes: int | None) -> bytes:
    """RIFF, ``fmt `` and ``data`` headers of 16-bit mono; None states an unknown length."""
    riff_size, data_size = _UNKNOWN_SIZE, _UNKNOWN_SIZE
    if num_bytes is not None:
        riff_size, data_size = 36 + num_bytes, num_bytes
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        riff_size,
        b"WAVE",
        b"fmt ",
        16,  # bytes in this chunk
        1,  # integer PCM
        1,  # channels
        sample_rate,
        sample_rate * 2,  # bytes per second
        2,  # bytes per sample frame
        16,  # bits per sample
        b"data",
        data_size,
    )


def _to_int16(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    scaled = np.rint(np.clip(samples, -1.0, 1.0) * 32767.0)
    return np.asarray(scaled, "<i2")
