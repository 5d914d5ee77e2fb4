"""The engine for asyncio callers: many requests at once, each an iterator of audio increments.

Owns the engine process and the tasks of all open requests. Loads no torch, and knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from itertools import count
from typing import Generic, TypeVar

from vllm.config import EngineConfig
from vllm.exceptions import EngineDeadError, EngineError, HiggsAudioError, RequestAbortedError
from vllm.logger import get_logger
from vllm.outputs import FinishReason, SpeechOutput
from vllm.player import VirtualPlayer
from vllm.prompts import SpeechPrompt, VoiceSource
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core_client import IpcClient
from vllm.v1.engine.messages import EngineCoreOutput, EngineInfo, EngineStats
from vllm.v1.engine.processor import Processor
from vllm.v1.engine.speech_task import SpeechTask

__all__ = ["AsyncLLM"]

logger = get_logger(__name__)

_SILENCE_LIMIT_S = 5.0

VoicesT = TypeVar("VoicesT", bound=VoiceSource)


class _Stream:
    """An open request: its task, and what its reader has not taken yet."""

    def __init__(self, task: SpeechTask) -> None:
        self.task = task
        self._items: asyncio.Queue[SpeechOutput | HiggsAudioError] = asyncio.Queue()

    def put(self, item: SpeechOutput | HiggsAudioError) -> None:
        self._items.put_nowait(item)

    async def get(self) -> SpeechOutput:
        item = await self._items.get()
        if isinstance(item, HiggsAudioError):
            raise item
        return item


class AsyncLLM(Generic[VoicesT]):
    """Speech synthesis as asynchronous iterators, from an engine in a process of its own.

    Args:
        config: of the engine.
        make_voices: makes the voice library, once the engine has told what its codec can do.

    Example:
        >>> async for part in llm.generate(SpeechPrompt(text="Hello."), SamplingParams(), "r1"):
        ...     play(part.audio)
    """

    def __init__(self, config: EngineConfig, make_voices: Callable[[EngineInfo], VoicesT]) -> None:
        self.config = config
        self.info: EngineInfo | None = None
        self.voices: VoicesT | None = None
        self._make_voices = make_voices
        self._client = IpcClient(config)
        self._processor: Processor | None = None
        self._streams: dict[str, _Stream] = {}  # id of the part in the engine -> stream
        self._open_ids: set[str] = set()
        self._early_aborts: set[str] = set()  # aborted before the engine heard of them
        self._suffixes = count(1)
        self._stats = EngineStats()
        self._asked_at: float | None = None  # monotonic; None: it has spoken since
        self._death: HiggsAudioError | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def processor(self) -> Processor | None:
        """What makes prompts of requests; None until the engine is warm."""
        return self._processor

    @property
    def is_ready(self) -> bool:
        return self._processor is not None and self._death is None

    @property
    def is_dead(self) -> bool:
        return self._death is not None

    async def start(self) -> None:
        """Start the engine process and wait until it is warm; once.

        Raises:
            HiggsAudioError: it cannot start; the message says why.
        """
        if self._death is not None:
            raise EngineDeadError("this engine has ended; make a new AsyncLLM")
        try:
            self.info = await self._client.start()
            self.voices = self._make_voices(self.info)
            self._processor = Processor(self.config, self.info, self.voices)
        except BaseException as error:
            self._death = EngineDeadError(f"the engine did not start: {error}")
            await self._client.shutdown()
            raise
        self._reader = asyncio.create_task(self._read(), name="engine outputs")

    async def generate(
        self,
        prompt: SpeechPrompt,
        params: SamplingParams,
        request_id: str,
        *,
        timeout_s: float | None = None,
        priority: int = 0,
        player: VirtualPlayer | None = None,
    ) -> AsyncGenerator[SpeechOutput]:
        """Speak; the first item comes with the first audio, the last has ``finish_reason``.

        Leaving the iterator, or cancelling it, aborts the request.

        Args:
            prompt: what to say, and how.
            params: how it is sampled.
            request_id: any name; one that is in use gets a suffix.
            timeout_s: after which the request ends with ``deadline``.
            priority: smaller is sooner.
            player: follows whoever plays the audio while it is made, on ``time.monotonic``; None
                when nobody does.

        Raises:
            InvalidRequestError: the request is wrong; raised before the first item.
            EngineDeadError: the engine process is gone.
            EngineError: the engine failed this request.
            RequestAbortedError: ``abort`` was called before the engine heard of the request.
        """
        await self.check_health()
        assert self._processor is not None
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        unique_id = self._unique(request_id)
        try:
            # Clips are decoded and texts tokenised here, which may take a while.
            task = await asyncio.to_thread(
                self._processor.process,
                unique_id,
                prompt,
                params,
                priority=priority,
                player=player,
            )
            if unique_id in self._early_aborts:
                raise RequestAbortedError("the request was aborted")
            stream = _Stream(task)
            await self._submit(stream)
            expiry = self._expire_at(deadline, task)
            try:
                while True:
                    item = await stream.get()
                    yield item
                    if item.finished:
                        return
            finally:
                if expiry is not None:
                    expiry.cancel()
                if task.finish_reason is None:
                    await self._abort(task, FinishReason.ABORT)
                self._streams.pop(task.core_id, None)
        finally:
            self._open_ids.discard(unique_id)
            self._early_aborts.discard(unique_id)

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator gets a last item with ``abort``. Unknown ids are ignored."""
        if request_id in self._open_ids:
            self._early_aborts.add(request_id)
        for stream in list(self._streams.values()):
            if stream.task.request_id == request_id:
                await self._abort(stream.task, FinishReason.ABORT)

    async def check_health(self) -> None:
        """Raises EngineDeadError unless the engine is ready."""
        if self._death is not None:
            raise EngineDeadError(str(self._death))
        if self._processor is None:
            raise EngineDeadError("the engine is still starting")

    async def probe(self) -> bool:
        """Whether the engine goes on; False when it owes an answer for over five seconds.

        Asks and does not wait, so that only a later call tells. A step that takes so long looks no
        different from one that never ends.
        """
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            with contextlib.suppress(EngineDeadError):
                await self._client.probe()
            return True
        return now - self._asked_at < _SILENCE_LIMIT_S

    async def wait_dead(self) -> None:
        """Return when the engine process is gone and every open request knows."""
        await self._client.wait_dead()
        if self._reader is not None:
            await asyncio.wait({self._reader})

    def engine_stats(self) -> EngineStats:
        """Queues, caches and codec, as the engine last told."""
        return self._stats

    async def shutdown(self) -> None:
        """End the engine process; open requests end with EngineDeadError."""
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        self._die(EngineDeadError("the server is shutting down"))
        await self._client.shutdown()

    def _unique(self, request_id: str) -> str:
        unique = request_id
        while unique in self._open_ids:
            unique = f"{request_id}-{next(self._suffixes)}"
        self._open_ids.add(unique)
        return unique

    def _expire_at(self, deadline: float | None, task: SpeechTask) -> asyncio.TimerHandle | None:
        """End the task at a time of the loop's clock."""
        if deadline is None:
            return None
        loop = asyncio.get_running_loop()
        return loop.call_at(
            deadline, lambda: loop.create_task(self._abort(task, FinishReason.DEADLINE))
        )

    async def _submit(self, stream: _Stream) -> None:
        """Send the current part of a task to the engine."""
        await self.check_health()  # a death wakes the streams there are, and no later one
        request = stream.task.next_request()
        self._streams[request.request_id] = stream
        await self._client.add_request(request)

    async def _abort(self, task: SpeechTask, reason: FinishReason) -> None:
        task.break_off(reason)
        with contextlib.suppress(EngineDeadError):
            await self._client.abort_requests((task.core_id,), reason)

    async def _read(self) -> None:
        """Pass on what the engine says, until it is gone."""
        try:
            while True:
                outputs = await self._client.get_outputs()
                self._asked_at = None
                if outputs.failure is not None:
                    raise EngineDeadError(outputs.failure)
                self._stats = outputs.stats
                for output in outputs.outputs:
                    await self._deliver(output)
        except HiggsAudioError as error:
            self._die(error)
        except Exception as error:  # with nobody to read on, every stream would wait for ever
            logger.exception("what the engine says cannot be read")
            self._die(EngineDeadError(f"what the engine says cannot be read: {error}"))
            await self._client.shutdown()

    async def _deliver(self, output: EngineCoreOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return  # its reader has left
        if output.finish_reason is not None:
            del self._streams[output.request_id]
        try:
            await self._take_in(stream, output)
        except HiggsAudioError as error:
            stream.put(error)
        except Exception as error:  # of this request; the others must still hear of theirs
            logger.exception("a request failed", extra={"request_id": stream.task.request_id})
            stream.put(EngineError(f"the request failed: {error}"))

    async def _take_in(self, stream: _Stream, output: EngineCoreOutput) -> None:
        item = stream.task.absorb(output)
        if item.finish_reason is FinishReason.ERROR:
            raise EngineError(item.error or "the engine failed the request")
        stream.put(item)
        if output.finish_reason is not None and not item.finished:
            await self._submit(stream)

    def _die(self, error: HiggsAudioError) -> None:
        if self._death is None:
            self._death = error
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put(EngineDeadError(str(error)))
