"""Audio files and signals outside the engine: formats, encoding, stretching, resampling, clips.

Works on float32 numpy arrays and bytes; knows neither torch, models nor HTTP. PyAV and soxr are
loaded by the first call that needs them, so importing this package is cheap and always works.
"""

from __future__ import annotations

from vllm.audio.encode import StreamEncoder, encode_all, make_encoder
from vllm.audio.formats import FORMATS, AudioFormat, lookup
from vllm.audio.reference import decode_clip, pad_to_multiple, parse_data_url, read_wav
from vllm.audio.resample import downmix, resample
from vllm.audio.stretch import MAX_SPEED, MIN_SPEED, TimeStretch

__all__ = [
    "FORMATS",
    "MAX_SPEED",
    "MIN_SPEED",
    "AudioFormat",
    "StreamEncoder",
    "TimeStretch",
    "decode_clip",
    "downmix",
    "encode_all",
    "lookup",
    "make_encoder",
    "pad_to_multiple",
    "parse_data_url",
    "read_wav",
    "resample",
]
