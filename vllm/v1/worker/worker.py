"""One rank: its device, the model, codec and caches on it, and the runner that uses them.

Loads and sizes everything once; what runs when is decided elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vllm.config import EngineConfig
from vllm.exceptions import CheckpointError
from vllm.kernels.cache import allocate_kv_caches
from vllm.kernels.dependent_launch import DependentLaunch
from vllm.kernels.fused_step import can_fuse
from vllm.kernels.linear import find_row_quantum
from vllm.logger import get_logger
from vllm.model_executor.codecs import ClipCache, Codec, WindowPlan, load_codec
from vllm.model_executor.models import SpeechModel, load_model
from vllm.platforms import (
    check_dependent_launch,
    num_cores,
    resolve_kv_dtype,
    select_platform,
    use_float32_convolutions,
)
from vllm.v1.core.sched_output import SchedulerOutput
from vllm.v1.outputs import CodecStats, ModelRunnerOutput
from vllm.v1.worker.codec_runner import MAX_CUDA_BATCH, CodecRunner
from vllm.v1.worker.cuda_graphs import CudaGraphs, DecodeSizes, NoGraphs
from vllm.v1.worker.decoder import Decoder, HostDecoder, RowOwners
from vllm.v1.worker.device_decoder import DeviceDecoder
from vllm.v1.worker.device_prefill import PrefillSizes, RecordedPrefill
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.memory import CardMemory, KVBudget, StepSizes, num_kv_blocks
from vllm.v1.worker.model_state import CodebookModelState
from vllm.v1.worker.prefill import EagerPrefill, Prefiller
from vllm.v1.worker.window_decoder import recorded_sizes

__all__ = ["Worker", "WorkerInfo"]

logger = get_logger(__name__)

_SMALL_MATRIX = 2**22  # weights; with 2.1 million, one thread is twice as fast as two
_MAX_NUM_SEQS = {"cuda": 256, "cpu": 32}  # for --max-num-seqs 0


@dataclass(frozen=True)
class WorkerInfo:
    """What the engine core must know of a loaded worker."""

    architecture: str
    num_codebooks: int
    stream_bos_id: int
    stream_eos_id: int
    vocab_size: int
    sample_rate: int
    hop_length: int
    can_encode: bool
    codec_fingerprint: str
    max_num_seqs: int
    num_kv_blocks: int
    device: str
    dtype: str


class Worker:
    """Loads a model and a codec and executes steps.

    Args:
        config: of the engine.
        model_folder: local checkpoint of the model.
        codec_folder: local checkpoint of the codec.
        clip_cache_folder: where encoded reference clips are kept.

    Raises:
        CheckpointError: a checkpoint is wrong, or model and codec do not fit each other.
        ConfigError: the memory does not suffice, or the device is not there.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        model_folder: Path,
        codec_folder: Path,
        clip_cache_folder: Path | None,
    ) -> None:
        self._config = config
        self._platform = select_platform(config.device.device)
        check_dependent_launch(config.device.dependent_launch, self._platform)
        device = self._platform.device
        self._model = load_model(
            model_folder,
            device=device,
            dtype=config.model.dtype,
            max_model_len=config.model.max_model_len,
            quantization=config.model.quantization,
        )
        self._kv_dtype = resolve_kv_dtype(
            config.cache.kv_cache_dtype, self._model.spec.dtype, self._platform
        )
        num_threads = self._use_threads()
        use_float32_convolutions()
        uses_kernels = config.device.codec_kernels == "auto"
        codec = load_codec(codec_folder, device=device, uses_kernels=uses_kernels)
        _check_fit(self._model, codec)
        self._prepare_invariance()
        self._max_num_seqs = config.scheduler.max_num_seqs or _MAX_NUM_SEQS[device.type]
        self._codec = codec
        self._num_kv_blocks = num_kv_blocks(self._kv_budget())
        self._codec_runner = CodecRunner(
            codec,
            ramp=config.audio.stream_ramp,
            clip_cache=ClipCache(clip_cache_folder),
            num_threads=max(1, num_threads // 2),  # the rest is for the model's steps
            graphs=CudaGraphs(device) if self._uses_graphs else None,
        )
        self._runner = self._make_runner()
        self._runner.warm_up()

    @property
    def info(self) -> WorkerInfo:
        spec, codec = self._model.spec, self._codec
        return WorkerInfo(
            architecture=spec.architecture,
            num_codebooks=spec.num_codebooks,
            stream_bos_id=spec.stream_bos_id,
            stream_eos_id=spec.stream_eos_id,
            vocab_size=spec.vocab_size,
            sample_rate=codec.sample_rate,
            hop_length=codec.hop_length,
            can_encode=codec.can_encode,
            codec_fingerprint=codec.fingerprint,
            max_num_seqs=self._max_num_seqs,
            num_kv_blocks=self._num_kv_blocks,
            device=str(self._platform.device),
            dtype=str(spec.dtype).removeprefix("torch."),
        )

    def execute_model(self, plan: SchedulerOutput, *, wait_s: float) -> ModelRunnerOutput:
        """Run one step; see ``GPUModelRunner.execute_model``."""
        return self._runner.execute_model(plan, wait_s=wait_s)

    def encode_clip(self, key: str, samples: NDArray[np.float32]) -> None:
        """Queue a reference clip; its codes come with a later step's output."""
        self._codec_runner.encode(key, samples)

    def has_codec_work(self) -> bool:
        """Whether audio or codes will come without another step of the model."""
        return self._codec_runner.has_work()

    def codec_stats(self) -> CodecStats:
        """What the codec has done since ``reset_codec_stats``."""
        return self._codec_runner.stats()

    def reset_codec_stats(self) -> None:
        self._codec_runner.reset_stats()

    def check_integrity(self) -> None:
        self._runner.check_integrity()

    def shutdown(self) -> None:
        self._codec_runner.shutdown()

    @property
    def _uses_graphs(self) -> bool:
        return self._platform.is_cuda and not self._config.device.enforce_eager

    @property
    def _records_prefill(self) -> bool:
        """Where kernels take any prompt in tensors of fixed shapes; a CPU stands in for them."""
        spec, device = self._model.spec, self._platform.device
        is_served = can_fuse(device, hidden_size=spec.hidden_size, head_dim=spec.head_dim)
        return (is_served or device.type == "cpu") and not self._config.device.enforce_eager

    def _use_threads(self) -> int:
        """Set torch's threads for the CPU path; returns how many cores there are to share.

        The products of a small model are over before a second thread has taken its part.
        """
        num_threads = self._config.device.cpu_threads or num_cores()
        if self._platform.is_cuda:
            return num_threads
        is_small = self._model.largest_matrix <= _SMALL_MATRIX
        one_is_best = is_small and not self._config.device.cpu_threads
        torch.set_num_threads(1 if one_is_best else num_threads)
        return num_threads

    def _prepare_invariance(self) -> None:
        if not self._config.device.batch_invariant:
            self._model.set_row_quantum(1)
        elif not self._platform.is_cuda:
            quantum = find_row_quantum(self._model.matrices())
            self._model.set_row_quantum(quantum)
            if quantum > 1:
                logger.info("batch-invariant products pad rows to multiples of %d", quantum)

    def _kv_budget(self) -> KVBudget:
        cache = self._config.cache
        sizes = {
            "bytes_per_block": self._model.spec.kv_bytes_per_position(self._kv_dtype)
            * cache.block_size,
            "block_size": cache.block_size,
            "max_model_len": self._config.model.max_model_len,
            "max_num_seqs": self._max_num_seqs,
            "requested_bytes": cache.kv_cache_memory,
        }
        if not self._platform.is_cuda:
            return KVBudget.of_host(self._platform.memory().free_bytes, **sizes)
        memory = self._card_memory()
        logger.info("memory: %s for the KV cache", memory.arithmetic)
        return KVBudget.of_card(memory, **sizes)

    def _card_memory(self) -> CardMemory:
        spec, codec, config = self._model.spec, self._codec, self._config
        max_num_tokens = config.scheduler.max_num_batched_tokens
        prefill = PrefillSizes(max_num_tokens).all if self._records_prefill else []
        num_graphs = len(DecodeSizes(self._max_num_seqs, spec.max_model_len).all) + len(prefill)
        num_frames = max(config.audio.stream_ramp) + 2 * codec.context_frames
        windows = WindowPlan(codec.context_frames, config.audio.stream_ramp, widens_last=True)
        codec_graphs = recorded_sizes(windows.usual_shapes, MAX_CUDA_BATCH)
        torch.cuda.empty_cache()
        memory = self._platform.memory()
        return CardMemory(
            total_bytes=memory.total_bytes,
            utilization=config.cache.gpu_memory_utilization,
            used_bytes=memory.total_bytes - memory.free_bytes,
            sizes=StepSizes(
                num_graphs=0 if config.device.enforce_eager else num_graphs,
                max_rows=max(
                    *(max_num_tokens, self._max_num_seqs), *(size.num_rows for size in prefill)
                ),
                widest_row=self._model.largest_matrix // spec.hidden_size,
                bytes_per_number=spec.dtype.itemsize,
                num_codec_graphs=0 if config.device.enforce_eager else len(codec_graphs),
                codec_batch=MAX_CUDA_BATCH,
                codec_samples=num_frames * codec.hop_length,
            ),
        )

    def _make_runner(self) -> GPUModelRunner:
        spec, block_size = self._model.spec, self._config.cache.block_size
        device = self._platform.device
        # One block and one row more than there are, for rows that pad a batch.
        kv_caches = allocate_kv_caches(
            spec.num_layers,
            self._num_kv_blocks + 1,
            block_size,
            spec.num_kv_heads,
            spec.head_dim,
            dtype=self._kv_dtype,
            device=device,
        )
        has_mirrors = _decodes_on_device(device)
        # Decode and prefill share it, since their steps follow each other on one stream. A step
        # is many short kernels, each of which would wait for a long one of the codec.
        graphs = CudaGraphs(device, is_urgent=True) if self._uses_graphs else NoGraphs()

        def make_prefiller(owners: RowOwners) -> Prefiller:
            eager = EagerPrefill(owners, device)
            if not (has_mirrors and self._records_prefill):
                return eager
            return RecordedPrefill(
                owners,
                eager,
                device=device,
                graphs=graphs,
                max_num_tokens=self._config.scheduler.max_num_batched_tokens,
            )

        def make_decoder(owners: RowOwners) -> Decoder:
            if not has_mirrors:
                return HostDecoder(owners)
            return DeviceDecoder(
                owners,
                device=device,
                graphs=graphs,
                batch_invariant=self._config.device.batch_invariant,
                pdl=DependentLaunch(self._config.device.dependent_launch),
            )

        return GPUModelRunner(
            self._model,
            CodebookModelState(self._model, self._max_num_seqs + 1, device),
            self._codec_runner,
            kv_caches,
            make_prefiller=make_prefiller,
            make_decoder=make_decoder,
            has_mirrors=has_mirrors,
            block_size=block_size,
            max_num_seqs=self._max_num_seqs,
            device=device,
        )


def _decodes_on_device(device: torch.device) -> bool:
    return device.type == "cuda"


def _check_fit(model: SpeechModel, codec: Codec) -> None:
    spec = model.spec
    if spec.num_codebooks != codec.num_codebooks or spec.stream_bos_id > codec.codebook_size:
        raise CheckpointError(
            f"model and codec do not fit: the model makes {spec.num_codebooks} codes below "
            f"{spec.stream_bos_id} per frame, the codec takes {codec.num_codebooks} below "
            f"{codec.codebook_size}"
        )
