"""The engine for scripts: prompts in, finished audio out.

Runs the engine in this process and needs neither a server nor its libraries.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm.config import EngineConfig
from vllm.entrypoints.bosonai.voices import VoiceLibrary, check_presets
from vllm.exceptions import EngineDeadError, InvalidRequestError
from vllm.outputs import SpeechOutput
from vllm.prompts import SpeechPrompt
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.engine.messages import EngineInfo
from vllm.v1.engine.processor import Processor
from vllm.v1.engine.speech_task import SpeechTask

__all__ = ["LLM"]


class LLM:
    """A speech model, loaded and ready. Calls from several threads take turns.

    Args:
        model: Hub id or folder; None is the embedded model.
        audio_tokenizer: Hub id or folder of the codec; None is the published one, or the embedded
            model's own.
        voices_dir: folder of voice presets; None takes the shipped ones.
        default_voice: voice of prompts that name none.
        **options: any option of ``EngineConfig``, by the name of its flag: ``device``, ``dtype``,
            ``max_num_seqs``, ``max_model_len``, ``kv_cache_memory``, ...

    Raises:
        CheckpointError: what is to be loaded is wrong or cannot be had.
        ConfigError: an option is unknown or wrong, or the memory does not suffice.

    Example:
        >>> llm = LLM(device="cpu")
        >>> out = llm.generate(SpeechPrompt(text="Hello.", voice="en_woman"))[0]
        >>> out.audio, out.sample_rate
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        audio_tokenizer: str | Path | None = None,
        voices_dir: str | Path | None = None,
        default_voice: str | None = None,
        **options: Any,
    ) -> None:
        self.config = EngineConfig.from_options(
            model=None if model is None else str(model),
            audio_tokenizer_type=None if audio_tokenizer is None else str(audio_tokenizer),
            **options,
        )
        folder = None if voices_dir is None else Path(voices_dir)
        check_presets(self.config, folder, default_voice=default_voice)
        self._client = InprocClient(self.config)
        self.voices = VoiceLibrary.for_engine(self.info, folder=folder, default_voice=default_voice)
        self._processor = Processor(self.config, self.info, self.voices)
        self._turn = threading.Lock()
        self._is_shut_down = False

    @property
    def info(self) -> EngineInfo:
        """What was loaded."""
        return self._client.info

    def generate(
        self,
        prompts: SpeechPrompt | str | Sequence[SpeechPrompt | str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[SpeechOutput]:
        """Speak all prompts, batched together; outputs come in the order of the prompts.

        Args:
            prompts: one or many; a plain string is a text in the default voice.
            params: for all, or one for each; None is the default.
            use_tqdm: show a progress bar where ``tqdm`` is installed.

        Raises:
            InvalidRequestError: a prompt is wrong; then none has been started.
            EngineDeadError: the engine was shut down.
        """
        many = [prompts] if isinstance(prompts, (SpeechPrompt, str)) else list(prompts)
        settings = _one_for_each(params, len(many))
        tasks = [
            self._processor.process(str(index), _as_prompt(prompt), each)
            for index, (prompt, each) in enumerate(zip(many, settings, strict=True))
        ]
        with self._turn:
            if self._is_shut_down:
                raise EngineDeadError("the engine was shut down; make a new LLM")
            return self._run(tasks, use_tqdm=use_tqdm)

    def shutdown(self) -> None:
        """Stop the engine, once nothing is spoken; the object is of no use afterwards."""
        with self._turn:
            self._is_shut_down = True
            self._client.shutdown()

    def _run(self, tasks: Sequence[SpeechTask], *, use_tqdm: bool) -> list[SpeechOutput]:
        increments: dict[str, list[SpeechOutput]] = {task.request_id: [] for task in tasks}
        requests = [task.next_request() for task in tasks]
        live = {task.core_id: task for task in tasks}
        for request in requests:
            self._client.add_request(request)
        try:
            with _Progress(len(tasks), enabled=use_tqdm) as progress:
                while live:
                    for output in self._client.get_outputs().outputs:
                        task = live.get(output.request_id)
                        if task is None:
                            continue
                        item = task.absorb(output)
                        increments[task.request_id].append(item)
                        progress.advance(item)
                        if output.finish_reason is None:
                            continue
                        del live[output.request_id]
                        if not item.finished:
                            self._client.add_request(task.next_request())
                            live[task.core_id] = task
        except BaseException:
            self._client.abort_requests(tuple(live))
            raise
        return [_joined(increments[task.request_id]) for task in tasks]


class _Progress:
    """A progress bar over requests that also counts audio seconds, if tqdm is there."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar: Any = None
        self._audio_s = 0.0
        if not enabled:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=total, desc="Speaking", unit="request")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, item: SpeechOutput) -> None:
        if self._bar is None:
            return
        self._audio_s += item.audio.size / item.sample_rate
        self._bar.set_postfix_str(f"{self._audio_s:.1f} s of audio")
        if item.finished:
            self._bar.update()


def _as_prompt(prompt: SpeechPrompt | str) -> SpeechPrompt:
    return SpeechPrompt(text=prompt) if isinstance(prompt, str) else prompt


def _one_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise InvalidRequestError(
            f"{len(params)} sampling parameters for {num_prompts} prompts; give one for all or one "
            "for each",
            param="params",
        )
    return list(params)


def _joined(increments: Sequence[SpeechOutput]) -> SpeechOutput:
    """One output of all increments, in order."""
    last = increments[-1]
    return SpeechOutput(
        request_id=last.request_id,
        audio=np.concatenate([item.audio for item in increments]),
        codes=np.concatenate([item.codes for item in increments], axis=1),
        delayed_codes=np.concatenate([item.delayed_codes for item in increments]),
        sample_rate=last.sample_rate,
        finish_reason=last.finish_reason,
        usage=last.usage,
        stats=last.stats,
        seed=last.seed,
        error=last.error,
    )
