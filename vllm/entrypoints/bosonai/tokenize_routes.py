"""``/tokenize`` and ``/detokenize``: text into ids and back, and the prompts that requests become.

A chat or speech request is checked and built as it would be to be spoken, and then shown instead.
Loads no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request

from vllm.entrypoints.bosonai.admission import owner_of
from vllm.entrypoints.bosonai.engine_host import EngineHost
from vllm.entrypoints.bosonai.serving_audio import ServingAudio
from vllm.entrypoints.bosonai.serving_chat import ServingChat
from vllm.entrypoints.openai.chat_protocol import ChatCompletionRequest
from vllm.entrypoints.openai.errors import read_body
from vllm.entrypoints.openai.protocol import AudioSpeechRequest
from vllm.entrypoints.openai.reply_bodies import Detokenized, Tokenized
from vllm.entrypoints.openai.reply_docs import error_replies, json_reply
from vllm.entrypoints.openai.tokenize_protocol import DetokenizeRequest, TokenizeRequest
from vllm.exceptions import InvalidRequestError

if TYPE_CHECKING:
    from vllm.entrypoints.server_config import ServerConfig
    from vllm.prompts import SpeechPrompt, TextTokenizer
    from vllm.v1.engine.processor import Processor

__all__ = ["add_tokenize_routes"]


def add_tokenize_routes(
    app: FastAPI, config: ServerConfig, host: EngineHost, speech: ServingAudio, chat: ServingChat
) -> None:
    """Add ``POST /tokenize`` and ``POST /detokenize``."""

    def processor() -> Processor:
        found = host.ready_engine().processor
        assert found is not None, "a ready engine has its processor"
        return found

    async def prompt_of(body: TokenizeRequest, raw: Request) -> SpeechPrompt:
        """What a chat or speech request would be spoken from."""
        if body.messages is None:
            return (await speech.prepare(read_body(AudioSpeechRequest, body.request_fields))).prompt
        request = read_body(ChatCompletionRequest, body.request_fields)
        return (await chat.prepare(request, owner_of(raw, config))).prompt

    @app.post("/tokenize", responses={**json_reply(Tokenized), **error_replies(400, 404, 503)})
    async def tokenize(body: TokenizeRequest, raw: Request) -> dict[str, Any]:
        """Ids of a text, or of the prompts that a chat or speech request becomes."""
        host.ready_engine()
        speech.check_model(body.model)
        if body.prompt is not None:
            speech.check_length(body.prompt, field="prompt")
            parts = [await asyncio.to_thread(_text_ids, processor(), body)]
        else:
            prompt = await prompt_of(body, raw)
            built = await asyncio.to_thread(processor().prompts_of, prompt)
            parts = [each.token_ids.tolist() for each in built]
        return await asyncio.to_thread(
            _described, processor(), parts, has_strs=bool(body.return_token_strs)
        )

    @app.post("/detokenize", responses={**json_reply(Detokenized), **error_replies(400, 404, 503)})
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of ids, special tokens spelt out."""
        host.ready_engine()
        speech.check_model(body.model)
        return {"prompt": await asyncio.to_thread(_text_of, processor().tokenizer, body.tokens)}


def _text_ids(processor: Processor, body: TokenizeRequest) -> list[int]:
    assert body.prompt is not None
    ids = processor.tokenizer.encode(body.prompt)
    return [*processor.start_ids, *ids] if body.begins_with_special else ids


def _described(
    processor: Processor, parts: Sequence[Sequence[int]], *, has_strs: bool
) -> dict[str, Any]:
    ids = list(chain.from_iterable(parts))
    return {
        "count": len(ids),
        "max_model_len": processor.max_model_len,
        "tokens": ids,
        "token_strs": [processor.tokenizer.spell(each) for each in ids] if has_strs else None,
        "parts": [len(part) for part in parts],
    }


def _text_of(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    for index, token_id in enumerate(ids):
        if tokenizer.spell(token_id) is None:
            raise InvalidRequestError(
                f"tokens[{index}]={token_id} is no id of this model; they go from 0 to "
                f"{tokenizer.vocab_size - 1}",
                param="tokens",
            )
    return tokenizer.decode(ids)
