"""Sampling of all codebooks of all rows in one call."""

from vllm.v1.sample.device_sampler import FrameSampler, TorchDeviceSampler
from vllm.v1.sample.metadata import RowSettings, SamplingMetadata
from vllm.v1.sample.sampler import Sampler

__all__ = [
    "FrameSampler",
    "RowSettings",
    "Sampler",
    "SamplingMetadata",
    "TorchDeviceSampler",
]
