"""Signals, readers and outside programs for the audio tests."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def voice_like():
    """Deterministic tones with a slow swell and a little noise: f(seconds, rate) -> [n]."""

    def make(seconds: float, rate: int = 24_000) -> np.ndarray:
        t = np.arange(round(seconds * rate)) / rate
        tones = 0.3 * np.sin(2 * np.pi * 220 * t) + 0.15 * np.sin(2 * np.pi * 660 * t)
        noise = np.random.default_rng(0).standard_normal(len(t)) * 0.002
        return (tones * (0.6 + 0.4 * np.sin(2 * np.pi * 1.5 * t)) + noise).astype(np.float32)

    return make


@pytest.fixture
def decode_file():
    """f(bytes) -> (float samples [n], rate), by PyAV."""
    import av

    def decode(data: bytes) -> tuple[np.ndarray, int]:
        with av.open(io.BytesIO(data)) as container:
            to_float = av.AudioResampler(format="flt", layout="mono")
            parts, rate = [np.zeros(0, np.float32)], 0
            for frame in container.decode(audio=0):
                rate = frame.sample_rate
                parts += [out.to_ndarray()[0] for out in to_float.resample(frame)]
        return np.concatenate(parts), rate

    return decode


@pytest.fixture
def write_file():
    """f(samples [channels, n], rate, container, codec) -> bytes, by PyAV alone."""
    import av

    def write(samples: np.ndarray, rate: int, container: str, codec: str) -> bytes:
        out = io.BytesIO()
        layout = "mono" if len(samples) == 1 else "stereo"
        with av.open(out, "w", format=container) as target:
            stream = target.add_stream(codec, rate=rate, layout=layout)
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples, np.float32), format="fltp", layout=layout
            )
            frame.sample_rate = rate
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                target.mux(packet)
        return out.getvalue()

    return write


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., str]:
    """f(name, file bytes, *arguments with {file}) -> its output; skips where it is missing."""

    def run(name: str, data: bytes, *args: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"{name} is not on PATH (Debian package ffmpeg)")
        file = tmp_path / "reply.bin"
        file.write_bytes(data)
        done = subprocess.run(
            [path, "-v", "error", *(arg.format(file=file) for arg in args)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout

    return run
