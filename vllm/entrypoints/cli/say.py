"""``vllm say "text" -o out.wav``: speak into a file with the offline engine."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.audio import FORMATS, MAX_SPEED, MIN_SPEED, TimeStretch, lookup, make_encoder
from vllm.config import EngineConfig
from vllm.entrypoints.cli_args import add_engine_flags, normalize_flags, parse_engine_config
from vllm.exceptions import ConfigError
from vllm.logger import configure_logging
from vllm.prompts import SpeechPrompt
from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllm.outputs import SpeechOutput

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Speak the text and write the file; one line at the end says what was made."""
    parser = _parser()
    arguments = parser.parse_args(normalize_flags(argv))
    try:
        options = _engine_options(parse_engine_config(vars(arguments)))
    except ConfigError as error:
        parser.error(str(error))
    lookup(arguments.output.suffix.lstrip("."), param="--output")
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

    llm = LLM(voices_dir=arguments.voice_presets_dir, **options)
    try:
        output = llm.generate([prompt], params)[0]
    finally:
        llm.shutdown()
    num_bytes = _write(output, arguments.output, arguments.speed)
    print(
        f"{arguments.output}: {num_bytes} bytes, {output.stats.audio_duration_s:.2f} s of audio, "
        f"seed {output.seed}, ended by {output.finish_reason}"
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
        "--voice-presets-dir", metavar="DIR", help="folder with config.json and clips"
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


def _write(output: SpeechOutput, path: Path, speed: float) -> int:
    """Write the audio in the format of the extension; returns the file's size."""
    fmt = lookup(path.suffix.lstrip("."), param="--output")
    encoder = make_encoder(fmt, output.sample_rate, streaming=False)
    stretch = TimeStretch(output.sample_rate, speed)
    data = encoder.encode(stretch.process(output.audio))
    data += encoder.encode(stretch.finish())
    data += encoder.finish()
    return path.write_bytes(data)
