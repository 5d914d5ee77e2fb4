"""Draws one held-out sentence as the teacher, the codec and the model speak it.

python -m training.draw --data DIR --model DIR --out docs/embedded-model.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.speech_quality import read_sentences, speak
from training.corpus import Corpus
from training.features import mel_filters
from vllm.entrypoints.llm import LLM
from vllm.model_executor.codecs import load_codec

_WINDOW, _HOP, _MELS = 1024, 240, 100
_RATE = 24000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of corpus.safetensors")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sentence", type=int, default=0, help="of tests/quality/sentences.tsv")
    args = parser.parse_args()
    sentence = read_sentences()[args.sentence]
    corpus = Corpus.load(args.data / "corpus.safetensors")
    index = [_plain(text) for text in corpus.texts].index(_plain(sentence.text))
    codes = torch.from_numpy(corpus.codes_of(index).T.astype(np.int64))
    codec = load_codec(args.model / "codec", device="cpu")
    llm = LLM(
        args.model / "lm",
        audio_tokenizer=args.model / "codec",
        voices_dir=args.model / "voices",
        device="cpu",
    )
    take = speak(llm, [sentence], [0])[0]
    llm.shutdown()
    rows = {
        "teacher": corpus.samples_of(index),
        "codec round trip": codec.decode(codes[None])[0].numpy(),
        "model": take.samples,
    }
    seconds = max(map(len, rows.values())) / _RATE
    figure = Figure(figsize=(9, 7), layout="constrained")
    for number, (name, samples) in enumerate(rows.items(), start=1):
        _draw(figure.add_subplot(3, 1, number), name, samples, seconds)
    figure.suptitle(sentence.text)
    figure.savefig(args.out, dpi=90)


def _plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalpha())


def _draw(axes: Axes, name: str, samples: NDArray[np.float32], seconds: float) -> None:
    spectrum = torch.stft(
        torch.from_numpy(samples),
        _WINDOW,
        _HOP,
        window=torch.hann_window(_WINDOW),
        return_complex=True,
    ).abs()
    mel = torch.log10(mel_filters(_MELS, _WINDOW) @ spectrum + 1e-5)
    extent = (0, len(samples) / _RATE, 0, _MELS)
    axes.imshow(mel, origin="lower", aspect="auto", extent=extent, vmin=-4.5, vmax=0.5)
    axes.set_xlim(0, seconds)
    axes.set_ylabel(f"{name}\nmel band")
    axes.set_xlabel("seconds")


if __name__ == "__main__":
    main()
