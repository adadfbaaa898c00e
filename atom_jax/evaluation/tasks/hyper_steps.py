"""Of chains that a program made: how often each kind of step is what the model thinks likeliest."""

from __future__ import annotations

import collections

import numpy as np

from atom_jax.data import puzzles
from atom_jax.inference.score import apply
from atom_jax.kvcache.dense import bucket
from atom_jax.typing import LM

_ROWS = 8


def judge(lm: LM, puzzle: puzzles.Puzzle, chains: int) -> dict[str, float]:
    """Shares by kind of step, and "chain": that of chains all of whose steps are right. Steps that chance decides
    about count nowhere. chains: so many of the validation problems."""
    corpus, end = puzzles.Generated(puzzle, "validation"), lm.tokenizer.eos_ids[0]
    texts = [corpus.read(i).decode() for i in range(chains)]
    right: dict[str, list[bool]] = collections.defaultdict(list)
    whole = []
    for start in range(0, chains, _ROWS):
        part = texts[start : start + _ROWS]
        rows = [np.array([*lm.tokenizer.front, *lm.tokenizer.encode(text), end]) for text in part]
        length = bucket(max(map(len, rows)))
        ids = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
        said = np.asarray(apply(lm, ids, np.arange(length)[None] < [[len(row)] for row in rows]).logits.argmax(-1))
        for text, row, likeliest in zip(part, rows, said):
            steps = puzzle.steps(text.partition(f" {puzzle.END} ")[2])
            first = len(row) - 1 - len(steps)
            hits = likeliest[first - 1 : -1][: len(steps)] == row[first:-1]
            counted = [(step.kind, bool(hit)) for step, hit in zip(steps, hits) if not step.free]
            for kind, hit in counted:
                right[kind].append(hit)
            whole.append(all(hit for _, hit in counted))
    return {kind: float(np.mean(hits)) for kind, hits in sorted(right.items())} | {"chain": float(np.mean(whole))}
