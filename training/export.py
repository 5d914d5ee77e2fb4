"""Writes the trained weights as a checkpoint in Higgs Audio v2's layout, for the ordinary loader.

    python -m training.export --codec DIR --decoder DIR [--encoder DIR] --lm DIR --out DIR

The language model is written in bfloat16, the codec in float16. Without an encoder the codec decodes
only.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.decoder import Decoder
from training.encoder import codec_config
from training.features import FRAME
from training.lexicon import load_lexicon
from training.network import Sizes
from training.prompt import NUM_TOKENS, TOKEN_ID
from training.tokenizer import write_tokenizer
from vllm.checkpoint_config import HiggsAudioConfig
from vllm.checkpoints.make_codec import write_codec
from vllm.checkpoints.make_model import write_configuration
from vllm.entrypoints.bosonai.voices import SHIPPED_PRESETS
from vllm.model_executor.codecs.higgs import HiggsCodecConfig
from vllm.model_executor.codecs.higgs_tensors import fold_weight_norm

_VOICE = "en_woman"
_MAX_CHARS = 56  # one sentence, which is what the training texts hold
AUDIO_HEAD = "audio_lm_head.weight"
TEXT_HEAD = "text_lm_head.weight"
TEMPERATURES = (0.5, 0.25)  # of the first codebook and of the others


def export_lm(
    folder: Path, tensors: dict[str, Tensor], *, temperatures: tuple[float, float] = (1.0, 1.0)
) -> None:
    """Write a model folder from a network's ``state_dict``.

    ``temperatures``, as of ``TEMPERATURES``, go into the rows of the head, so that sampling at 1 is
    sampling at these: a small model is surest where it does not guess.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = lm_config(1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name))
    write_configuration(folder, config)
    write_tokenizer(folder, load_lexicon())
    # Nothing is trained to write text; the layout has the head.
    tensors = tensors | {
        AUDIO_HEAD: sharpened(tensors[AUDIO_HEAD], temperatures),
        TEXT_HEAD: torch.zeros(config.vocab_size, config.hidden_size),
    }
    rounded = {name: each.to(torch.bfloat16) for name, each in tensors.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})


def sharpened(head: Tensor, temperatures: tuple[float, float]) -> Tensor:
    """Rows of the audio head over the temperature of their codebook, the first's or the others'."""
    first, others = head.split([Sizes.codebook_size, len(head) - Sizes.codebook_size])
    return torch.cat([first / temperatures[0], others / temperatures[1]])


def lm_config(num_layers: int) -> HiggsAudioConfig:
    """Configuration of an exported model, by the sizes that training fixes."""
    sizes = Sizes(NUM_TOKENS, num_hidden_layers=num_layers)
    return HiggsAudioConfig(
        layout="transformers",
        architecture="HiggsAudioV2ForConditionalGeneration",
        dtype="bfloat16",
        vocab_size=NUM_TOKENS,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_attention_heads,
        head_dim=sizes.hidden_size // sizes.num_attention_heads,
        rms_norm_eps=sizes.rms_norm_eps,
        rope_theta=sizes.rope_theta,
        rope_scaling=None,
        num_codebooks=sizes.num_codebooks,
        codebook_size=sizes.codebook_size,
        stream_bos_id=1024,
        stream_eos_id=1025,
        audio_token_id=TOKEN_ID["<|AUDIO_OUT|>"],
        audio_in_token_id=TOKEN_ID["<|AUDIO|>"],
        audio_delay_token_id=TOKEN_ID["<|reserved_special_token_6|>"],
        audio_out_bos_token_id=TOKEN_ID["<|audio_out_bos|>"],
        audio_eos_token_id=TOKEN_ID["<|audio_eos|>"],
        bos_token_id=TOKEN_ID["<|begin_of_text|>"],
        eos_token_id=TOKEN_ID["<|eot_id|>"],
        pad_token_id=TOKEN_ID["<|end_of_text|>"],
    )


def export_codec(
    folder: Path,
    codebooks: Tensor,
    decoder: dict[str, Tensor],
    encoder: dict[str, Tensor] | None = None,
) -> None:
    """Write a codec folder from codebooks [8, 1024, size] and the ``state_dict`` of its networks.

    Without an encoder's the codec decodes only.
    """
    config = _codec_config(codebooks.shape[-1], decoder)
    if encoder is None:
        config = replace(config, decode_only=True)
    size, inner = config.acoustic_size, config.quantizer_size
    trained = {f"acoustic_decoder.{name}": each for name, each in decoder.items()}
    tensors = dict(fold_weight_norm((trained | (encoder or {})).items()))
    # The published quantizer projects to the width of its encoder and back. Here the first channels
    # are what is quantized, and the next what only the first stage looks at.
    widen = torch.eye(inner, size)
    sight = torch.eye(size, inner)
    first_sight = sight + sight.roll(size, 1)
    for index, book in enumerate(codebooks):
        prefix = f"quantizer.quantizers.{index}"
        tensors[f"{prefix}.codebook.embed"] = book
        tensors[f"{prefix}.project_out.weight"] = widen.clone()
        tensors[f"{prefix}.project_out.bias"] = torch.zeros(inner)
        if encoder is not None:
            tensors[f"{prefix}.project_in.weight"] = (sight if index else first_sight).clone()
            tensors[f"{prefix}.project_in.bias"] = torch.zeros(size)
    tensors["fc2.weight"] = torch.eye(size, inner)
    tensors["fc2.bias"] = torch.zeros(size)
    rounded = {name: each.half().contiguous() for name, each in tensors.items()}
    write_codec(folder, config, rounded, layout="transformers")


def _codec_config(size: int, decoder: dict[str, Tensor]) -> HiggsCodecConfig:
    width = len(decoder["conv1.bias"])
    config = codec_config(size, width)
    expected = set(Decoder(size, width).state_dict())
    if set(decoder) != expected or config.hop_length != FRAME:
        raise SystemExit("the decoder's weights are not those of training/decoder.py")
    return config


def export_voices(folder: Path) -> None:
    """Write a presets folder: the shipped voices, of which only the trained one speaks."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = json.loads((SHIPPED_PRESETS / "config.json").read_text(encoding="utf-8"))
    entries = {}
    for voice_id, entry in shipped.items():
        kept = {key: entry[key] for key in ("name", "language", "description") if key in entry}
        is_ours = voice_id == _VOICE
        entries[voice_id] = kept | (
            {"trained": True, "max_chars": _MAX_CHARS, "default": True}
            if is_ours
            else {"speaks": False}
        )
    text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", type=Path, required=True, help="folder of make_codes")
    parser.add_argument("--decoder", type=Path, required=True, help="folder of train_decoder")
    parser.add_argument("--encoder", type=Path, help="folder of train_encoder")
    parser.add_argument("--lm", type=Path, required=True, help="folder of train_lm")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs=2,
        default=TEMPERATURES,
        help="of the first codebook and of the others, at which sampling at 1 draws",
    )
    args = parser.parse_args()
    codebooks = load_file(args.codec / "codebooks.safetensors")["codebooks"]
    export_codec(
        args.out / "codec",
        codebooks,
        load_file(args.decoder / "decoder.safetensors"),
        load_file(args.encoder / "encoder.safetensors") if args.encoder else None,
    )
    export_lm(
        args.out / "lm",
        load_file(args.lm / "lm.safetensors"),
        temperatures=tuple(args.temperatures),
    )
    export_voices(args.out / "voices")


if __name__ == "__main__":
    main()
