"""Neural audio codecs: frames of codes to samples, and reference clips to codes.

``registry`` loads one by name; ``streaming`` plans windows and ``clip_cache`` keeps encodings, for
any of them.
"""

from vllm.model_executor.codecs.clip_cache import ClipCache
from vllm.model_executor.codecs.interface import Codec
from vllm.model_executor.codecs.registry import is_codec, load_codec
from vllm.model_executor.codecs.streaming import DEFAULT_RAMP, Window, WindowPlan, WindowShape

__all__ = [
    "DEFAULT_RAMP",
    "ClipCache",
    "Codec",
    "Window",
    "WindowPlan",
    "WindowShape",
    "is_codec",
    "load_codec",
]
