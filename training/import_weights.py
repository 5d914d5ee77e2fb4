"""Turns an exported model back into the folders that the training commands resume from.

    python -m training.import_weights --model vllm/assets/higgs-audio-tiny --out work

The codebooks are not among them: they come from the data, which has to be made again anyway. The
temperatures that ``export`` puts into the head are taken out: the next export puts them in again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.decoder import Decoder
from training.encoder import Encoder
from training.export import AUDIO_HEAD, TEMPERATURES, TEXT_HEAD, sharpened
from vllm.model_executor.codecs.higgs_tensors import fold_weight_norm


def import_lm(model: Path, out: Path, *, temperatures: tuple[float, float] = (1.0, 1.0)) -> None:
    """Write ``lm.safetensors``; ``temperatures`` are those that the model was exported with."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = load_file(model / "lm" / "model.safetensors")
    kept = {name: each.float() for name, each in tensors.items() if name != TEXT_HEAD}
    first, others = temperatures
    kept[AUDIO_HEAD] = sharpened(kept[AUDIO_HEAD], (1 / first, 1 / others))
    save_file(kept, out / "lm.safetensors")


def import_decoder(model: Path, out: Path) -> None:
    """Write ``decoder.safetensors``, with the weights split into length and direction again."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = load_file(model / "codec" / "model.safetensors")
    prefix = "acoustic_decoder."
    folded = {
        name.removeprefix(prefix): each.float()
        for name, each in tensors.items()
        if name.startswith(prefix)
    }
    width, size = folded["conv1.weight"].shape[:2]
    wanted = Decoder(size, width).state_dict()
    save_file({name: _unfolded(name, folded) for name in wanted}, out / "decoder.safetensors")


def import_encoder(model: Path, out: Path) -> None:
    """Write ``encoder.safetensors``, where the codec has an encoder."""
    folded = dict(fold_weight_norm(load_file(model / "codec" / "model.safetensors").items()))
    if "fc.weight" not in folded:
        return
    out.mkdir(parents=True, exist_ok=True)
    folded = {name: each.float() for name, each in folded.items()}
    wanted = Encoder(len(folded["fc2.bias"])).state_dict()
    save_file({name: _unfolded(name, folded) for name in wanted}, out / "encoder.safetensors")


def _unfolded(name: str, folded: dict[str, Tensor]) -> Tensor:
    weight, found, which = name.partition(".parametrizations.weight.original")
    if not found:
        return folded[name]
    direction = folded[f"{weight}.weight"]
    if which == "1":
        return direction
    return torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with lm and codec")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs=2,
        default=TEMPERATURES,
        help="that the model was exported with",
    )
    args = parser.parse_args()
    import_lm(args.model, args.out / "lm", temperatures=tuple(args.temperatures))
    import_decoder(args.model, args.out / "decoder")
    import_encoder(args.model, args.out / "encoder")


if __name__ == "__main__":
    main()
