"""Writes speech with exact alignments: shards of texts, symbols, durations, F0 and samples.

    python -m training.make_data --out DIR [--shards 12] [--minutes 30]

Shard 0 is for validation and short; no other shard says a sentence of it. A shard that is there
already is kept, so an interrupted run goes on where it was; every shard comes from its own seed,
whatever was made before it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from training.alphabet import SYMBOL_ID, split
from training.corpus import said_sentences, shard_path
from training.lexicon import load_lexicon
from training.teacher import HOP, SAMPLE_RATE, Teacher
from training.text import FINAL_KINDS, KINDS, TextSource, load_vocabulary, spell

SPEED = 0.72  # of the teacher; slow, so that short sounds get a codec frame of their own
_VALIDATION_MINUTES = 8.0
_MAX_SECONDS = 6.0


def make_shard(
    path: Path,
    index: int,
    minutes: float,
    teacher: Teacher,
    *,
    kinds: Mapping[str, float] = KINDS,
    held_out: frozenset[str] = frozenset(),
) -> None:
    """Write one shard: utterances until they last ``minutes``, none of them ``held_out``."""
    rng = np.random.default_rng([2026, index])
    lexicon, rare = load_lexicon(), teacher.rare_words()
    source = TextSource(rng, load_vocabulary(), sorted(rare), kinds=kinds)
    spellings = rare | lexicon
    texts, drawn_kinds, symbols, durations, f0, samples = [], [], [], [], [], []
    total, wanted = 0, int(minutes * 60 * SAMPLE_RATE)
    with tqdm(total=round(minutes, 1), desc=path.name, unit="min", mininterval=2) as progress:
        while total < wanted:
            text, kind = source.draw()
            if text in held_out:
                continue
            phonemes = spell(text, spellings)
            spoken = teacher.speak(phonemes, speed=SPEED, seed=len(texts))
            if len(spoken.samples) > _MAX_SECONDS * SAMPLE_RATE:
                continue
            texts.append(text)
            drawn_kinds.append(kind)
            symbols.append([SYMBOL_ID[symbol] for symbol in split(phonemes)])
            durations.append(spoken.durations)
            f0.append(spoken.f0)
            samples.append((np.clip(spoken.samples, -1, 1) * 32767).astype(np.int16))
            total += len(spoken.samples)
            progress.update(len(spoken.samples) / SAMPLE_RATE / 60)
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        texts=np.array(json.dumps({"texts": texts, "kinds": drawn_kinds})),
        symbols=np.concatenate(symbols).astype(np.uint8),
        num_symbols=np.array([len(each) for each in symbols]),
        durations=np.concatenate(durations).astype(np.uint8),  # two more than symbols, each
        f0=np.concatenate(f0).astype(np.float16),
        samples=np.concatenate(samples),
        num_frames=np.array([len(each) // HOP for each in samples]),  # the teacher's
    )
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="shard to begin with")
    parser.add_argument("--minutes", type=float, default=30.0, help="of speech in a shard")
    parser.add_argument("--sentences", action="store_true", help="more than half of the texts")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    teacher = Teacher()
    for index in range(args.first, args.shards):
        path = shard_path(args.out, index)
        if not path.exists():
            minutes = args.minutes if index else _VALIDATION_MINUTES
            held_out = said_sentences(shard_path(args.out, 0)) if index else frozenset()
            kinds = FINAL_KINDS if args.sentences else KINDS
            make_shard(path, index, minutes, teacher, kinds=kinds, held_out=held_out)


if __name__ == "__main__":
    main()
