"""``vllm say "text" -o out.wav``: speak into a file with the offline engine."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm.audio import FORMATS, MAX_SPEED, MIN_SPEED, TimeStretch, encode_all, lookup
from vllm.config import EngineConfig
from vllm.entrypoints.bosonai.voices import VoiceLibrary
from vllm.entrypoints.cli_args import add_engine_flags, normalize_flags, parse_engine_config
from vllm.exceptions import ConfigError, UnknownVoiceError
from vllm.logger import configure_logging
from vllm.prompts import SpeechPrompt, Voice
from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllm.outputs import SpeechOutput

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Speak the text and write the file; one line at the end says what was made."""
    parser = _parser()
    arguments = parser.parse_args(normalize_flags(argv))
    try:
        config = parse_engine_config(vars(arguments))
    except ConfigError as error:
        parser.error(str(error))
    _check_output(arguments.output)
    _check_speed(arguments.speed)
    _check_voice(arguments.voice, arguments.voice_presets_dir, config)
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    prompt = SpeechPrompt(
        text=text,
        voice=arguments.voice,
        instructions=arguments.instructions,
        language=arguments.language,
    )
    params = SamplingParams(
        seed=arguments.seed,
        temperature=arguments.temperature,
        ras_window_length=arguments.ras_window_length,
        ras_max_num_repeat=arguments.ras_max_num_repeat,
        ras_mode=arguments.ras_mode,
    )
    configure_logging("warning")
    from vllm.entrypoints.llm import LLM

    llm = LLM(voices_dir=arguments.voice_presets_dir, **_engine_options(config))
    try:
        _tell_fallback(llm.voices.resolve(arguments.voice))
        output = llm.generate([prompt], params)[0]
    finally:
        llm.shutdown()
    seconds = _write(output, arguments.output, arguments.speed)
    print(
        f"{arguments.output}: {seconds:.2f} s of audio, seed {output.seed}, "
        f"ended by {output.finish_reason}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm say",
        usage='%(prog)s "TEXT" -o FILE [flags]',
        allow_abbrev=False,
        conflict_handler="resolve",  # --seed is refused for a server, and means something here
    )
    add_engine_flags(parser)
    parser.add_argument("text", metavar="TEXT", help="what to speak; - reads standard input")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"its extension is the format: {', '.join(FORMATS)}",
    )
    parser.add_argument("--voice", help="id or alias of a voice; default: the default voice")
    parser.add_argument(
        "--voice-presets-dir", type=Path, metavar="DIR", help="folder with config.json and clips"
    )
    parser.add_argument("--seed", type=int, help="0 or more; drawn at random when absent")
    parser.add_argument("--temperature", type=float, default=SamplingParams.temperature)
    parser.add_argument(
        "--speed", type=float, default=1.0, help=f"{MIN_SPEED} to {MAX_SPEED}, pitch kept"
    )
    parser.add_argument("--instructions", help="how to speak; joins the voice's scene")
    parser.add_argument("--language", help="ISO 639-1 code, for sentence splitting")
    return parser


def _engine_options(config: EngineConfig) -> dict[str, Any]:
    """Flat options, as ``LLM`` takes them."""
    options: dict[str, Any] = {}
    for concern in dataclasses.fields(config):
        part = getattr(config, concern.name)
        options.update({item.name: getattr(part, item.name) for item in dataclasses.fields(part)})
    options["audio_tokenizer"] = options.pop("audio_tokenizer_type")
    return options


def _check_output(path: Path) -> None:
    """Refuse before the model is loaded what could not be written afterwards."""
    lookup(path.suffix.lstrip("."), param="--output")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.parent}")


def _check_speed(speed: float) -> None:
    if not MIN_SPEED <= speed <= MAX_SPEED:
        raise ConfigError(f"--speed {speed:g}: {MIN_SPEED} to {MAX_SPEED}")


def _check_voice(name: str | None, folder: Path | None, config: EngineConfig) -> None:
    if folder is None and config.uses_embedded_model:
        return  # which may bring voices along, and is loaded at once
    try:
        VoiceLibrary.without_engine(folder).resolve(name)
    except UnknownVoiceError as error:
        raise ConfigError(f"--voice {name}: {error}") from error


def _tell_fallback(voice: Voice) -> None:
    """Say who speaks where the voice that was asked for cannot."""
    if voice.asked_for:
        print(
            f"vllm say: the model does not speak {voice.asked_for}; {voice.voice_id} speaks instead",
            file=sys.stderr,
        )


def _write(output: SpeechOutput, path: Path, speed: float) -> float:
    """Write the audio in the format of the extension; returns its seconds."""
    stretch = TimeStretch(output.sample_rate, speed)
    samples = np.concatenate([stretch.process(output.audio), stretch.finish()])
    path.write_bytes(encode_all(samples, lookup(path.suffix.lstrip(".")), output.sample_rate))
    return samples.size / output.sample_rate
