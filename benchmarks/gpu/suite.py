"""What all sections are given: the device, the sizes, the ledger, and how long they may take.

Knows no section.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.gpu.floors import Ceilings, Work
from benchmarks.gpu.ledger import Figure, Ledger
from vllm.checkpoint_config import HiggsAudioConfig
from vllm.platforms import is_lost

__all__ = ["ABLATIONS", "FULL", "QUICK", "TOY", "Scale", "Suite"]

# What a section measures beside the engine as it is: name -> what is then otherwise.
ABLATIONS = {
    "eager": "decode and prefill steps without graphs",
    "not-invariant": "a row's bits may depend on the others",
    "dependent-launch": "kernels of a step start before the ones ahead have ended",
    "prefetch": "and ask for their first weights meanwhile",
    "fp8-weights": "weights of one byte",
    "fp8": "weights and keys and values of one byte",
    "cudnn": "the codec's convolutions by cuDNN, in float32",
    "tf32": "the codec's convolutions by cuDNN, which rounds them",
}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of everything that is measured."""

    model: str  # of ``make_model.SIZES``
    codec: str  # of ``make_codec.CODEC_SIZES``
    dtype: torch.dtype
    ceiling_bytes: int  # of the buffers that are read and copied
    matmul_size: int
    num_graph_nodes: int
    micro_rows: tuple[int, ...]
    sampler_rows: tuple[int, ...]
    attention_batches: tuple[int, ...]
    invariant_rows: tuple[int, ...]
    contexts: tuple[int, ...]
    step_batches: tuple[int, ...]
    num_steps: int
    prefill_lengths: tuple[int, ...]
    codec_batches: tuple[int, ...]
    max_model_len: int
    engine_streams: tuple[int, ...]
    requests_per_stream: int
    num_invariance_requests: int
    num_rounds: int
    # Prompt positions and frames of a short request, as Seed-TTS has them, and of a long one.
    short: tuple[int, int] = (156, 102)
    long: tuple[int, int] = (350, 400)
    # Prompt positions of a voice, and of the text behind it, where the voice is in the cache.
    cached: tuple[int, int] = (300, 60)


FULL = Scale(
    model="3b",
    codec="full",
    dtype=torch.bfloat16,
    ceiling_bytes=4 << 30,
    matmul_size=8192,
    num_graph_nodes=143,
    micro_rows=(1, 8, 16, 32, 64, 128, 256, 512),
    sampler_rows=(1, 64, 256),
    attention_batches=(1, 8, 64, 256),
    invariant_rows=(1, 2, 7, 16, 17, 64, 65, 200, 256),
    contexts=(400, 800, 1500),
    step_batches=(1, 8, 32, 64, 128, 256),
    num_steps=200,
    prefill_lengths=(64, 128, 256, 350, 600, 1024),
    codec_batches=(1, 8, 32),
    max_model_len=2048,
    engine_streams=(1, 8, 32, 64, 128, 256),
    requests_per_stream=4,
    num_invariance_requests=38,
    num_rounds=20,
)

# What the targets ask for and little else, for a first look at a card.
QUICK = replace(
    FULL,
    micro_rows=(1, 64),
    sampler_rows=(64,),
    attention_batches=(1, 64),
    invariant_rows=(1, 17, 64),
    contexts=(800,),
    step_batches=(1, 64),
    prefill_lengths=(64, 350),
    codec_batches=(1, 32),
    engine_streams=(1, 64, 128),
    requests_per_stream=2,
    num_invariance_requests=16,
    num_rounds=10,
)

TOY = Scale(
    model="tiny",
    codec="tiny",
    dtype=torch.float32,
    ceiling_bytes=1 << 20,
    matmul_size=64,
    num_graph_nodes=3,
    micro_rows=(1, 2),
    sampler_rows=(1,),
    attention_batches=(1, 2),
    invariant_rows=(1, 3),
    contexts=(20,),
    step_batches=(1, 2),
    num_steps=3,
    prefill_lengths=(16,),
    codec_batches=(1,),
    max_model_len=128,
    engine_streams=(1, 2),
    requests_per_stream=1,
    num_invariance_requests=3,
    num_rounds=2,
    short=(20, 18),
    long=(24, 18),
    cached=(32, 16),
)


@dataclass
class Suite:
    """One run."""

    device: torch.device
    scale: Scale
    folder: Path  # checkpoints without weights, see ``random_engine``
    config: HiggsAudioConfig
    ceilings: Ceilings
    ledger: Ledger
    seconds_per_section: float = 110.0
    ablations: Collection[str] = frozenset(ABLATIONS)
    flush: Callable[[], None] = lambda: None  # writes down what there is so far
    extras: dict[str, Any] = field(default_factory=dict)  # section -> what JSON gets beside figures
    _section: str = ""
    _deadline: float = 0.0

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def uses_triton(self) -> bool:
        """Whether kernels run here: on CUDA, or in Triton's interpreter."""
        return self.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"

    def begin(self, section: str) -> None:
        """Figures from now on are those of ``section``, which has its seconds from now on."""
        self._section = section
        self._deadline = time.monotonic() + self.seconds_per_section

    @property
    def is_over(self) -> bool:
        """Whether the section has used its time up."""
        return time.monotonic() > self._deadline

    def in_time(self, cases: Iterable[T]) -> Iterator[T]:
        """The cases, as long as the section has time; what is left out is noted."""
        cases = list(cases)
        for index, case in enumerate(cases):
            if self.is_over:
                left_out = ", ".join(map(str, cases[index:]))
                self.note(f"no time left for {left_out}")
                return
            yield case

    def note(self, text: str) -> None:
        """Say, and record, what is not measured."""
        line = f"{self._section}: {text}"
        self.ledger.notes.append(line)
        print(f"  {line}", flush=True)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Let what fails in here be a failure of its own, and the section go on behind it.

        Without the device nothing can go on, so then it is the section's.
        """
        try:
            yield
        except Exception:
            if is_lost(self.device):
                raise
            name = f"{self._section}: {what}"
            self.ledger.failures.append(name)
            self.extras[f"{name} failure"] = traceback.format_exc()
            print(f"  {name} failed", flush=True)
            traceback.print_exc()

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        work: Work | None = None,
        bound: float | None = None,
        note: str = "",
        is_wrong: bool = False,
    ) -> None:
        """Record a figure; with ``work`` its bound is the time that this takes at best."""
        if work is not None and bound is None:
            bound = work.floor_s(self.ceilings) * {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
        figure = Figure(
            section=self._section,
            name=name,
            value=value,
            unit=unit,
            bound=bound,
            num_bytes=None if work is None else work.num_bytes,
            num_operations=None if work is None else work.operations,
            note=note,
            is_wrong=is_wrong,
        )
        self.ledger.figures.append(figure)
        self.flush()

    def check(self, name: str, error: float, limit: float, *, unit: str = "") -> None:
        """Record an error that must not exceed ``limit``; what is no number does."""
        self.add(name, error, unit, note=f"limit {limit:g}", is_wrong=not error <= limit)
