from __future__ import annotations

import io
import re
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.audio import FORMATS, encode_all, make_encoder

RATE = 24_000
NAMES = list(FORMATS)
LIBRARY_NAMES = [name for name in NAMES if FORMATS[name].codec]
MP3_DELAY = 1105  # samples that LAME and the decoder put in front: 576 + 529
AAC_DELAY = 1024


def stream(name, pieces, rate=RATE):
    encoder = make_encoder(FORMATS[name], rate, streaming=True)
    return b"".join([*(encoder.encode(piece) for piece in pieces), encoder.finish()])


def snr_db(got, want):
    return 10 * np.log10(np.mean(want**2) / np.mean((got - want) ** 2))


def from_pcm(data):
    return np.frombuffer(data, "<i2").astype(np.float32) / 32767


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("name", LIBRARY_NAMES)
def test_decoded_audio_is_what_went_in(name, streaming, voice_like, decode_file):
    samples = voice_like(1.3)
    data = stream(name, [samples]) if streaming else encode_all(samples, FORMATS[name], RATE)
    decoded, rate = decode_file(data)
    decoded = decoded[:: rate // RATE]  # opus always plays at 48 kHz
    skip = {"aac": AAC_DELAY, "mp3": MP3_DELAY if streaming else 0}.get(name, 0)
    assert len(decoded) - skip >= len(samples)
    if name == "flac":
        np.testing.assert_allclose(decoded, np.rint(samples * 32767) / 32768, atol=1e-7)
    else:
        assert snr_db(decoded[skip : skip + len(samples)], samples) > 15


@pytest.mark.parametrize("name", NAMES)
def test_bytes_do_not_depend_on_cuts(name):
    rng = np.random.default_rng(1)
    samples = (rng.standard_normal(4_000) * 0.1).astype(np.float32)
    whole = stream(name, [samples])

    @settings(max_examples=12, deadline=None)
    @given(st.lists(st.integers(0, 4_000), max_size=8))
    def check(cuts):
        assert stream(name, np.split(samples, sorted(cuts))) == whole

    check()


@pytest.mark.parametrize("name", NAMES)
def test_complete_file_does_not_depend_on_cuts(name, voice_like):
    samples = voice_like(0.5)
    encoder = make_encoder(FORMATS[name], RATE, streaming=False)
    pieces = [encoder.encode(piece) for piece in np.array_split(samples, 7)]
    assert b"".join([*pieces, encoder.finish()]) == encode_all(samples, FORMATS[name], RATE)


@pytest.mark.parametrize("name", NAMES)
def test_no_version_in_the_file(name, voice_like):
    for data in (stream(name, [voice_like(0.3)]), encode_all(voice_like(0.3), FORMATS[name], RATE)):
        assert re.search(rb"Lav[fc]\d", data) is None


@pytest.mark.parametrize("name", ["opus", "aac", "flac"])
def test_streamed_and_complete_decode_to_the_same_samples(name, voice_like, decode_file):
    samples = voice_like(1.0)
    streamed, _ = decode_file(stream(name, [samples]))
    complete, _ = decode_file(encode_all(samples, FORMATS[name], RATE))
    np.testing.assert_array_equal(streamed, complete)


def test_streamed_mp3_differs_from_complete_only_by_delay_and_padding(voice_like, decode_file):
    samples = voice_like(1.0)
    streamed, _ = decode_file(stream("mp3", [samples]))
    complete, _ = decode_file(encode_all(samples, FORMATS["mp3"], RATE))
    assert len(complete) == len(samples)
    np.testing.assert_array_equal(streamed[MP3_DELAY : MP3_DELAY + len(samples)], complete)


@pytest.mark.parametrize("name", ["opus", "flac", "mp3"])
def test_complete_file_decodes_to_the_exact_length(name, voice_like, decode_file):
    samples = voice_like(1.0)[:-77]
    decoded, rate = decode_file(encode_all(samples, FORMATS[name], RATE))
    assert len(decoded) == len(samples) * (rate // RATE)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_come_early(name, voice_like):
    encoder = make_encoder(FORMATS[name], RATE, streaming=True)
    pieces = [encoder.encode(piece) for piece in np.split(voice_like(1.0), 10)]
    assert all(pieces)
    bits = FORMATS[name].bit_rate
    if bits:  # no more than 200 ms may be held back after one second
        assert sum(map(len, pieces)) > 0.5 * bits / 8 * 0.8


@pytest.mark.parametrize("name", [*LIBRARY_NAMES, "wav"])
def test_streamed_file_decodes_completely_in_ffmpeg(name, voice_like, program):
    samples = voice_like(1.0)
    data = stream(name, np.array_split(samples, 5))
    report = program("ffmpeg", data, "-i", "{file}", "-ar", str(RATE), "-f", "framecrc", "-")
    frames = [line.split(",") for line in report.splitlines() if not line.startswith("#")]
    num_samples = sum(int(frame[3]) for frame in frames)
    assert 0 <= num_samples - len(samples) <= 2 * 1024  # the codec's own delay and padding


@pytest.mark.parametrize(
    ("name", "tolerance_s"), [("mp3", 0.08), ("opus", 0.02), ("flac", 1e-4), ("wav", 1e-4)]
)
def test_complete_file_has_the_right_duration_in_ffprobe(name, tolerance_s, voice_like, program):
    data = encode_all(voice_like(2.0), FORMATS[name], RATE)
    args = ("-show_entries", "format=duration", "-of", "csv=p=0", "{file}")
    assert float(program("ffprobe", data, *args)) == pytest.approx(2.0, abs=tolerance_s)


def test_mp3_is_constant_128_kbit(voice_like):
    data = stream("mp3", [voice_like(2.4)])
    frame = 128_000 // 8 * 576 // RATE
    assert len(data) % frame == 0
    assert {data[at : at + 2] for at in range(0, len(data), frame)} == {b"\xff\xf3"}
    assert b"Xing" not in data
    assert b"Info" not in data
    assert data[:3] != b"ID3"


def test_complete_mp3_states_its_frames(voice_like):
    data = encode_all(voice_like(2.4), FORMATS["mp3"], RATE)
    at = data.index(b"Info")
    stated = int.from_bytes(data[at + 8 : at + 12], "big")
    assert (stated + 1) * 384 == len(data)


def test_every_streamed_ogg_page_is_20_ms(voice_like):
    data = stream("opus", [voice_like(0.5)])
    pages = [m.start() for m in re.finditer(rb"OggS\x00", data)]
    granules = [int.from_bytes(data[at + 6 : at + 14], "little") for at in pages[2:]]
    assert set(np.diff(granules[:-1])) == {960}


@pytest.mark.parametrize("streaming", [True, False])
def test_wav_sizes(streaming, voice_like):
    samples = voice_like(0.2)
    data = stream("wav", [samples]) if streaming else encode_all(samples, FORMATS["wav"], RATE)
    assert len(data) == 44 + 2 * len(samples)
    riff, body = int.from_bytes(data[4:8], "little"), int.from_bytes(data[40:44], "little")
    assert (riff, body) == (
        (0xFFFFFFFF, 0xFFFFFFFF) if streaming else (len(data) - 8, 2 * len(samples))
    )


def test_complete_wav_opens_in_the_strict_reader(voice_like):
    samples = voice_like(0.2)
    with wave.open(io.BytesIO(encode_all(samples, FORMATS["wav"], RATE))) as reader:
        assert reader.getnframes() == len(samples)
        assert reader.getframerate() == RATE
        data = reader.readframes(len(samples))
    assert data == encode_all(samples, FORMATS["pcm"], RATE)


def test_flac_states_its_length_only_when_complete(voice_like):
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    samples = voice_like(0.7)
    info = soundfile.info(io.BytesIO(encode_all(samples, FORMATS["flac"], RATE)))
    assert info.frames == len(samples)
    streamed = stream("flac", [samples])
    assert int.from_bytes(streamed[18:26], "big") & (2**36 - 1) == 0


def test_pcm_clips_and_rounds():
    samples = np.array([-2.0, -1.0, 0.0, 0.6 / 32767, 1.0, 1.5], np.float32)
    data = encode_all(samples, FORMATS["pcm"], RATE)
    assert np.frombuffer(data, "<i2").tolist() == [-32767, -32767, 0, 1, 32767, 32767]


@pytest.mark.parametrize("name", LIBRARY_NAMES)
@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_other_model_rates(name, rate, voice_like, decode_file):
    samples = voice_like(0.6, rate)
    data = stream(name, np.array_split(samples, 4), rate)
    decoded, got_rate = decode_file(data)
    assert got_rate == (48_000 if name == "opus" else rate)
    assert len(decoded) / got_rate == pytest.approx(0.6, abs=0.13)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_no_audio_at_all_still_finishes(name, streaming):
    encoder = make_encoder(FORMATS[name], RATE, streaming=streaming)
    data = encoder.finish()
    assert len(data) < 1_000


@pytest.mark.parametrize("name", LIBRARY_NAMES)
def test_an_encoder_may_be_dropped_halfway(name, voice_like):
    encoder = make_encoder(FORMATS[name], RATE, streaming=True)
    assert encoder.encode(voice_like(0.5))
    del encoder
