"""Speech language models and the one way to load them.

``interface`` is what the engine calls, ``registry`` turns an architecture name into a class
without importing the others; each remaining file is one model.
"""

from vllm.model_executor.models.interface import ModelSpec, SpeechModel
from vllm.model_executor.models.registry import check_architecture, load_model

__all__ = ["ModelSpec", "SpeechModel", "check_architecture", "load_model"]
