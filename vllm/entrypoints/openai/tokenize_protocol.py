"""Bodies of ``/tokenize`` and ``/detokenize``, with the fields that vLLM's clients know.

Says what was asked for; what a request becomes is worked out elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm.entrypoints.openai.protocol import Name, Text
from vllm.exceptions import InvalidRequestError

__all__ = ["DetokenizeRequest", "TokenizeRequest"]

_FORMS = ("prompt", "messages", "input")
_MAX_TOKENS = 131_072  # the longest context that any model here was made for
_MAX_INT32 = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=_MAX_INT32)]


class TokenizeRequest(BaseModel):
    """A text, or the body of a chat or speech request, whose other fields may stand beside these."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: Name | None = Field(None, description="a served model name; default: the first one")
    prompt: Text | None = Field(None, description="plain text; special tokens in it are text")
    messages: list[Any] | None = Field(None, description="of POST /v1/chat/completions")
    input: Any = Field(None, description="of POST /v1/audio/speech")
    return_token_strs: bool | None = Field(False, description="also say how each token is spelt")
    add_special_tokens: bool | None = Field(
        None, description="prompt: begin with the token that opens every prompt; default: true"
    )
    add_generation_prompt: bool | None = Field(None, description="true is all that is possible")
    continue_final_message: bool | None = Field(None, description="false is all that is possible")
    chat_template: Any = Field(None, description="refused unless null: the model has one form")

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequestError(
                f"one of prompt, messages and input is needed, not {' and '.join(given) or 'none'}",
                param=given[1] if given else "prompt",
            )
        self._refuse(
            "add_generation_prompt", (None, True), "a prompt always ends where audio opens"
        )
        self._refuse("continue_final_message", (None, False), "every answer is a turn of its own")
        self._refuse("chat_template", (None,), "the model knows one form of prompts")
        if self.prompt is None:
            self._refuse("add_special_tokens", (None, False), "the form of the prompt has them")
        return self

    def _refuse(self, name: str, allowed: tuple[Any, ...], reason: str) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise InvalidRequestError(
                f"{name}={str(value)[:100]!r} is not possible: {reason}; leave it out", param=name
            )

    @property
    def begins_with_special(self) -> bool:
        return self.add_special_tokens is not False

    @property
    def request_fields(self) -> dict[str, Any]:
        """The chat or speech request that this is about."""
        fields = {**(self.model_extra or {}), "model": self.model}
        if self.messages is not None:
            return {**fields, "messages": self.messages}
        return {**fields, "input": self.input}


class DetokenizeRequest(BaseModel):
    """Token ids to be spelt."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: Name | None = Field(None, description="a served model name; default: the first one")
    tokens: list[TokenId] = Field(max_length=_MAX_TOKENS)
