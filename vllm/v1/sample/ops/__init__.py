"""One sampling operation per file: its state of a step, whether any row needs it, its effect."""

from vllm.v1.sample.ops.repetition_aware import (
    RasParams,
    apply_ras_penalty,
    ras_params,
    redraw_repeated,
)
from vllm.v1.sample.ops.seeded import draw
from vllm.v1.sample.ops.temperature import Temperature, apply_temperature
from vllm.v1.sample.ops.topk_topp import TopKTopP, apply_top_k_top_p, top_k_top_p

__all__ = [
    "RasParams",
    "Temperature",
    "TopKTopP",
    "apply_ras_penalty",
    "apply_temperature",
    "apply_top_k_top_p",
    "draw",
    "ras_params",
    "redraw_repeated",
    "top_k_top_p",
]
