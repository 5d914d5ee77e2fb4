from __future__ import annotations

import base64
import struct
import sys

import numpy as np
import pytest

from vllm.audio import (
    FORMATS,
    decode_clip,
    downmix,
    encode_all,
    pad_to_multiple,
    parse_data_url,
    read_wav,
    resample,
)
from vllm.exceptions import InvalidRequestError


def chunk(name, body):
    return struct.pack("<4sI", name, len(body)) + body + b"\0" * (len(body) % 2)


def wav(body, *, bits=16, channels=1, rate=24_000, tag=1, before=b"", after=b"", extra=b""):
    width = channels * bits // 8
    fmt = struct.pack("<HHIIHH", tag, channels, rate, rate * width, width, bits) + extra
    inside = b"WAVE" + chunk(b"fmt ", fmt) + before + chunk(b"data", body) + after
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


RAMP = np.array([-1.0, -0.5, 0.0, 0.25, 0.5], np.float32)
RAMP16 = (RAMP * 32768).astype("<i2").tobytes()


@pytest.mark.parametrize(
    ("container", "codec", "rate", "channels"),
    [
        ("wav", "pcm_s16le", 8_000, 1),
        ("wav", "pcm_s16le", 44_100, 2),
        ("wav", "pcm_f32le", 48_000, 2),
        ("wav", "pcm_mulaw", 8_000, 1),
        ("mp3", "libmp3lame", 44_100, 2),
        ("ogg", "libopus", 48_000, 1),
        ("flac", "flac", 48_000, 2),
        ("mp4", "aac", 44_100, 1),
        ("webm", "libopus", 48_000, 1),
    ],
)
def test_any_format_and_rate(container, codec, rate, channels, voice_like, write_file):
    samples = np.repeat(voice_like(1.0, rate)[np.newaxis], channels, axis=0)
    clip = decode_clip(write_file(samples, rate, container, codec), sample_rate=24_000, pad_to=960)
    assert clip.dtype == np.float32
    assert len(clip) % 960 == 0
    assert len(clip) / 24_000 == pytest.approx(1.0, abs=0.12)
    spectrum = np.abs(np.fft.rfft(clip))
    assert spectrum.argmax() * 24_000 / len(clip) == pytest.approx(220, abs=3)
    assert np.abs(clip).max() == pytest.approx(np.abs(samples).max(), rel=0.15)


def test_stereo_is_the_mean_of_both_channels(write_file):
    t = np.arange(24_000) / 24_000
    left = (0.5 * np.sin(2 * np.pi * 300 * t)).astype(np.float32)
    both = np.stack([left, np.zeros_like(left)])
    clip = decode_clip(write_file(both, 24_000, "flac", "flac"), sample_rate=24_000)
    np.testing.assert_allclose(clip, left / 2, atol=1e-4)


def test_our_own_streamed_wav_can_be_a_clip(voice_like):
    data = bytearray(encode_all(voice_like(0.5), FORMATS["wav"], 24_000))
    data[4:8] = data[40:44] = b"\xff" * 4
    assert len(decode_clip(bytes(data), sample_rate=24_000)) == 12_000


@pytest.mark.parametrize("container", ["wav", "flac", "mp3"])
def test_too_long_is_refused(container, voice_like):
    data = encode_all(voice_like(2.5), FORMATS[container], 24_000)
    with pytest.raises(InvalidRequestError, match="longer than 2 seconds") as error:
        decode_clip(data, sample_rate=24_000, max_seconds=2)
    assert error.value.param == "ref_audio"


def test_too_many_bytes_are_refused(voice_like):
    with pytest.raises(InvalidRequestError, match="at most 1000"):
        decode_clip(
            encode_all(voice_like(1), FORMATS["wav"], 24_000), sample_rate=24_000, max_bytes=1000
        )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not audio",
        b"RIFF",
        b"RIFF\0\0\0\0WAVE",
        wav(b""),
        b"ID3" + b"\0" * 50,
        b"OggS" + b"\0" * 300,
        b"fLaC",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
        b"<html>" * 500,
        np.random.default_rng(3).bytes(50_000),
        wav(RAMP16, rate=1),
        wav(np.array([0, np.nan], "<f4").tobytes(), tag=3, bits=32),
    ],
)
def test_junk_is_refused_by_field(data):
    with pytest.raises(InvalidRequestError, match="ref_audio") as error:
        decode_clip(data, sample_rate=24_000)
    assert error.value.param == "ref_audio"


def test_playlists_and_scripts_open_nothing(tmp_path, voice_like):
    target = tmp_path / "secret.wav"
    target.write_bytes(encode_all(voice_like(1), FORMATS["wav"], 24_000))
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{target}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {target}\n",
    ):
        with pytest.raises(InvalidRequestError, match="cannot be decoded"):
            decode_clip(text.encode(), sample_rate=24_000)


def test_plain_wav_needs_no_library_and_others_name_it(monkeypatch, voice_like):
    samples = voice_like(0.2)
    mp3 = encode_all(samples, FORMATS["mp3"], 24_000)
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "soxr", None)
    wav_file = encode_all(samples, FORMATS["wav"], 24_000)
    assert len(decode_clip(wav_file, sample_rate=24_000)) == len(samples)
    with pytest.raises(InvalidRequestError, match="pip install av"):
        decode_clip(mp3, sample_rate=24_000)


@pytest.mark.parametrize(
    ("bits", "tag", "body"),
    [
        (8, 1, (RAMP * 128 + 128).astype(np.uint8).tobytes()),
        (16, 1, RAMP16),
        (24, 1, b"".join(int(v * 2**23).to_bytes(3, "little", signed=True) for v in RAMP)),
        (32, 1, (RAMP.astype(np.float64) * 2**31).astype("<i4").tobytes()),
        (32, 3, RAMP.tobytes()),
    ],
)
def test_wav_sample_formats(bits, tag, body):
    samples, rate = read_wav(wav(body, bits=bits, tag=tag))
    assert rate == 24_000
    np.testing.assert_array_equal(samples, RAMP)


def test_wav_chunks_around_the_data():
    data = wav(
        RAMP16,
        before=chunk(b"LIST", b"INFOodd") + chunk(b"_PMX", b"<x/>"),
        after=chunk(b"id3 ", b"ID3\4\0\0"),
    )
    np.testing.assert_array_equal(read_wav(data)[0], RAMP)


def test_wav_extensible():
    extra = struct.pack("<HHI", 22, 16, 4) + b"\1\0" + bytes(14)
    np.testing.assert_array_equal(read_wav(wav(RAMP16, tag=0xFFFE, extra=extra))[0], RAMP)


def test_wav_stereo_is_averaged():
    body = np.array([[8192, 0], [-8192, -8192]], "<i2").tobytes()
    np.testing.assert_array_equal(read_wav(wav(body, channels=2))[0], [0.125, -0.25])


@pytest.mark.parametrize("size", [0xFFFFFFFF, 1000])
def test_wav_with_a_wrong_data_size_ends_with_the_file(size):
    data = bytearray(wav(RAMP16))
    data[40:44] = struct.pack("<I", size)
    np.testing.assert_array_equal(read_wav(bytes(data) + b"\0")[0], RAMP)


def test_wav_from_a_path(tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(wav(RAMP16))
    np.testing.assert_array_equal(read_wav(path)[0], RAMP)


@pytest.mark.parametrize(
    "data", [b"", b"RIFF\0\0\0\0AVI ", wav(RAMP16, tag=7, bits=8), wav(RAMP16)[:30]]
)
def test_not_a_plain_wav(data):
    with pytest.raises(InvalidRequestError, match="wav file"):
        read_wav(data)


@pytest.mark.parametrize("form", ["{}", "data:audio/wav;base64,{}", "data:;base64,{}", " {}\n"])
def test_data_url(form):
    assert (
        parse_data_url(form.format(base64.b64encode(b"RIFFdata\xff").decode())) == b"RIFFdata\xff"
    )


@pytest.mark.parametrize(
    "text", ["", "data:audio/wav;base64,", "data:audio/wav,abc", "data:", "!!!!", "abc", "a\xe4=="]
)
def test_bad_data_url_names_the_field(text):
    with pytest.raises(InvalidRequestError, match="clip") as error:
        parse_data_url(text, param="clip")
    assert error.value.param == "clip"


def test_resample_keeps_the_tone():
    t = np.arange(44_100) / 44_100
    out = resample(np.sin(2 * np.pi * 1_000 * t).astype(np.float32), 44_100, 24_000)
    want = np.sin(2 * np.pi * 1_000 * np.arange(24_000) / 24_000)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[500:-500], want[500:-500], atol=1e-3)


def test_downmix_and_padding():
    np.testing.assert_array_equal(downmix(np.array([[1, 0], [0.5, 0.5]], np.float32)), [0.5, 0.5])
    np.testing.assert_array_equal(pad_to_multiple(np.ones(3, np.float32), 4), [1, 1, 1, 0])
    assert len(pad_to_multiple(np.ones(4, np.float32), 4)) == 4
