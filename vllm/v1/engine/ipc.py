"""Messages on the wire between the HTTP process and the engine process: ZeroMQ and msgpack.

Knows how a message is encoded and where its sockets lie; what it means is the two ends' business.
"""

from __future__ import annotations

from typing import Final

import msgspec

from vllm.config import EngineConfig
from vllm.exceptions import ConfigError
from vllm.v1.engine.messages import EngineCoreCommand, EngineCoreOutputs

__all__ = [
    "decode_command",
    "decode_config",
    "decode_outputs",
    "encode_command",
    "encode_config",
    "encode_outputs",
]

_ENCODER: Final = msgspec.msgpack.Encoder()
_COMMANDS: Final = msgspec.msgpack.Decoder(EngineCoreCommand)
_OUTPUTS: Final = msgspec.msgpack.Decoder(EngineCoreOutputs)


def encode_command(command: EngineCoreCommand) -> bytes:
    return _ENCODER.encode(command)


def decode_command(data: bytes) -> EngineCoreCommand:
    """Raises ``msgspec.ValidationError`` for bytes that are no command."""
    return _COMMANDS.decode(data)


def encode_outputs(outputs: EngineCoreOutputs) -> bytes:
    return _ENCODER.encode(outputs)


def decode_outputs(data: bytes) -> EngineCoreOutputs:
    """Raises ``msgspec.ValidationError`` for bytes that are no outputs."""
    return _OUTPUTS.decode(data)


def encode_config(config: EngineConfig) -> str:
    """One line of JSON."""
    return msgspec.json.encode(config).decode()


def decode_config(line: str) -> EngineConfig:
    """Raises ConfigError for a line that is no configuration."""
    try:
        return msgspec.json.decode(line, type=EngineConfig)
    except msgspec.DecodeError as error:
        raise ConfigError(f"the engine process was given no configuration: {error}") from error
