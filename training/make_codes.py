"""Fits the codec's codebooks and turns the shards into the one file that training reads.

    python -m training.make_codes --data DIR --out DIR

No network is trained here. Frames become vectors (features.py), those their principal components,
and these eight codes by residual k-means. The first codebook is phonetic: k-means runs inside the
frames of each phoneme, so a first code says which phoneme is being spoken. To predict it a model
has to read, and its own past codes tell it how far it has read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from training.alphabet import SYMBOLS
from training.corpus import Corpus, compress, shard_path
from training.features import FRAME, frame_features

TEACHER_HOP = 300
NUM_CODEBOOKS, CODEBOOK_SIZE, CODEBOOK_DIM = 8, 1024, 64
#: Labels beside the symbols: silence before and after the utterance.
LEAD, TAIL = len(SYMBOLS), len(SYMBOLS) + 1
NUM_LABELS = len(SYMBOLS) + 2

_F0_WEIGHT, _VOICING_WEIGHT = 3.0, 1.5
_FIT_SHARDS = 3
_FIT_FRAMES = 60_000
_ITERATIONS = 8
_SHARE_POWER = 0.6  # of a phoneme's frames, for its share of the first codebook
_HEARD_MINUTES = 20.0  # of samples kept for the decoder


class Shard(NamedTuple):
    texts: list[str]
    symbols: list[NDArray[np.uint8]]
    durations: list[NDArray[np.uint8]]
    features: list[NDArray[np.float32]]  # [num_frames, 328] each
    samples: list[NDArray[np.int16]]  # [num_frames * 960] each


def read_shard(path: Path) -> Shard:
    """Utterances of a shard, padded with silence to whole codec frames."""
    with np.load(path) as raw:
        texts = json.loads(str(raw["texts"]))["texts"]
        counts = raw["num_symbols"]
        symbols = np.split(raw["symbols"], np.cumsum(counts)[:-1])
        durations = np.split(raw["durations"], np.cumsum(counts + 2)[:-1])
        ends = np.cumsum(raw["num_frames"])[:-1]
        pitch = np.split(raw["f0"].astype(np.float32), ends)
        samples = np.split(raw["samples"], ends * TEACHER_HOP)
    padded = [np.pad(each, (0, -len(each) % FRAME)) for each in samples]
    features = [
        frame_features(each.astype(np.float32) / 32767, f0, TEACHER_HOP)
        for each, f0 in zip(tqdm(padded, desc=path.name, mininterval=5), pitch, strict=True)
    ]
    return Shard(texts, symbols, durations, features, padded)


def frame_labels(
    symbols: NDArray[np.uint8], durations: NDArray[np.uint8], num_frames: int
) -> NDArray[np.int64]:
    """Label of the sound at the middle of each codec frame."""
    ends = np.cumsum(durations.astype(np.int64)) * TEACHER_HOP
    centres = np.arange(num_frames) * FRAME + FRAME // 2
    labels = np.concatenate([[LEAD], symbols, [TAIL]])
    return labels[np.minimum(np.searchsorted(ends, centres, side="right"), len(labels) - 1)]


class Quantizer(NamedTuple):
    """From feature vectors to codes and back."""

    mean: Tensor  # [328]
    scale: Tensor  # [328]
    basis: Tensor  # [328, 64], orthonormal columns
    codebooks: Tensor  # [8, 1024, 64]
    label_of_code: Tensor  # [1024] of the first codebook

    def project(self, features: Tensor) -> Tensor:
        return ((features - self.mean) / self.scale) @ self.basis

    def encode(self, features: Tensor, labels: Tensor) -> Tensor:
        """Codes [T, 8] of frames whose sounds are known."""
        rest = self.project(features)
        forbidden = labels[:, None] != self.label_of_code
        codes = []
        for index, book in enumerate(self.codebooks):
            distance = (book * book).sum(1) - 2 * rest @ book.T
            if index == 0:
                distance.masked_fill_(forbidden, torch.inf)
            codes.append(distance.argmin(1))
            rest = rest - book[codes[-1]]
        return torch.stack(codes, 1)


def fit(features: Tensor, labels: Tensor) -> Quantizer:
    """Principal components and codebooks of frames [N, 328]."""
    mean, scale = _standards(features)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(features), generator=generator)[:_FIT_FRAMES]
    standard = ((features - mean) / scale)[chosen]
    labels = labels[chosen]
    _, _, components = torch.linalg.svd(standard[:20_000], full_matrices=False)
    basis = components[:CODEBOOK_DIM].T.contiguous()
    rest = standard @ basis
    print(f"{CODEBOOK_DIM} components keep {_share(rest, standard):.4f} of the variance")
    first, label_of_code = _phonetic_codebook(rest, labels, generator)
    codebooks = [first]
    quantizer = Quantizer(mean, scale, basis, first[None], label_of_code)
    rest = rest - first[quantizer.encode(features[chosen], labels)[:, 0]]
    for index in range(1, NUM_CODEBOOKS):
        print(f"codebook {index - 1}: {_share(rest, standard):.4f} of the variance is left")
        book = _kmeans(rest, CODEBOOK_SIZE, generator)
        rest = rest - book[_nearest(rest, book)]
        codebooks.append(book)
    print(f"codebook {NUM_CODEBOOKS - 1}: {_share(rest, standard):.4f} of the variance is left")
    return quantizer._replace(codebooks=torch.stack(codebooks))


def _standards(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each feature, and a scale common to all of its sort."""
    num_mel = features.shape[1] - 8
    deviation = features - features.mean(0)
    scale = torch.empty(features.shape[1])
    scale[:num_mel] = deviation[:, :num_mel].std()
    scale[num_mel : num_mel + 4] = deviation[:, num_mel : num_mel + 4].std() / _F0_WEIGHT
    scale[num_mel + 4 :] = deviation[:, num_mel + 4 :].std() / _VOICING_WEIGHT
    return features.mean(0), scale


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.square().sum() / whole.square().sum())


def _phonetic_codebook(
    vectors: Tensor, labels: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    counts = torch.bincount(labels, minlength=NUM_LABELS).float()
    sizes = _shares(counts)
    books, owners = [], []
    for label in range(NUM_LABELS):
        mine = vectors[labels == label]
        size = int(sizes[label])
        books.append(_kmeans(mine, size, generator) if len(mine) else torch.zeros(size, 64))
        owners.append(torch.full((size,), label))
    return torch.cat(books), torch.cat(owners)


def _shares(counts: Tensor) -> Tensor:
    """Codes of each label: at least one, never more than a quarter of its frames."""
    wanted = counts**_SHARE_POWER
    sizes = (wanted / wanted.sum() * CODEBOOK_SIZE).floor()
    sizes = sizes.minimum((counts / 4).floor()).clamp(min=1)
    spare = int(CODEBOOK_SIZE - sizes.sum())
    largest = counts.argsort(descending=True)
    for step in range(abs(spare)):
        sizes[largest[step % 20]] += 1 if spare > 0 else -1
    return sizes


def _kmeans(vectors: Tensor, size: int, generator: torch.Generator) -> Tensor:
    start = torch.randperm(len(vectors), generator=generator)[:size]
    book = vectors[start].clone()
    if len(book) < size:
        book = book[torch.arange(size) % len(book)]
    for _ in range(_ITERATIONS):
        nearest = _nearest(vectors, book)
        count = torch.bincount(nearest, minlength=size)
        total = torch.zeros_like(book).index_add_(0, nearest, vectors)
        book = total / count.clamp(min=1)[:, None]
        empty = count == 0
        drawn = torch.randint(len(vectors), (int(empty.sum()),), generator=generator)
        book[empty] = vectors[drawn]
    return book


def _nearest(vectors: Tensor, book: Tensor) -> Tensor:
    norms = (book * book).sum(1)
    return torch.cat([(norms - 2 * part @ book.T).argmin(1) for part in vectors.split(8192)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--first", type=int, default=1, help="shard to begin with, after shard 0")
    parser.add_argument("--codebooks", type=Path, help="file to take them from instead of fitting")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    quantizer = Quantizer(**load_file(args.codebooks)) if args.codebooks else _fit_to(args.data)
    save_file(quantizer._asdict(), args.out / "codebooks.safetensors")
    indices = [0, *range(args.first, args.shards)]
    _encode_all(args.data, indices, quantizer).save(args.out / "corpus.safetensors")


def _fit_to(folder: Path) -> Quantizer:
    """Codebooks of the first training shards."""
    # Encoding reads each shard again: all of their features at once would not fit into memory.
    fitted = [read_shard(shard_path(folder, 1 + index)) for index in range(_FIT_SHARDS)]
    features = np.concatenate([each for shard in fitted for each in shard.features])
    labels = np.concatenate([each for shard in fitted for each in _labels(shard)])
    return fit(torch.from_numpy(features), torch.from_numpy(labels))


def _labels(shard: Shard) -> list[NDArray[np.int64]]:
    parts = zip(shard.symbols, shard.durations, shard.features, strict=True)
    return [frame_labels(*each[:2], len(each[2])) for each in parts]


def _encode_all(folder: Path, indices: list[int], quantizer: Quantizer) -> Corpus:
    codes, symbols, durations, heard = [], [], [], []
    texts: list[str] = []
    seconds_heard = 0.0
    for index in indices:
        shard = read_shard(shard_path(folder, index))
        for features, labels in zip(shard.features, _labels(shard), strict=True):
            encoded = quantizer.encode(torch.from_numpy(features), torch.from_numpy(labels))
            codes.append(encoded.numpy().astype(np.int16))
        symbols += shard.symbols
        durations += shard.durations
        if index == 0:
            texts = shard.texts
        for samples in shard.samples:
            if seconds_heard < _HEARD_MINUTES * 60:
                heard.append(compress(samples.astype(np.float32) / 32767))
                seconds_heard += len(samples) / 24000
    return Corpus(
        codes=np.concatenate(codes),
        frame_offsets=np.cumsum([0, *map(len, codes)]),
        symbols=np.concatenate(symbols),
        symbol_offsets=np.cumsum([0, *map(len, symbols)]),
        durations=np.concatenate(durations),
        samples=np.concatenate(heard),
        num_heard=len(heard),
        num_validation=len(texts),
        texts=texts,
    )


if __name__ == "__main__":
    main()
