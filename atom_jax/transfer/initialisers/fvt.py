"""FVT: a token's row is a mean of the rows of the source tokens that its bytes are cut into (Gee et al., 2022, "Fast
Vocabulary Transfer for Language Model Compression")."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from atom_jax import config
from atom_jax.tokenizers.byte_view import ByteView
from atom_jax.transfer.initialisers.base import Initialiser, Task, blocks
from atom_jax.typing import AtomError

# Weight of piece i of m, before they are divided by their sum (but for "sum").
_WEIGHTS = {
    "mean": lambda i, m: np.ones(len(i)),
    "sum": lambda i, m: np.ones(len(i)),
    "first": lambda i, m: (i == 0).astype(np.float64),
    "last": lambda i, m: (i == m - 1).astype(np.float64),
    "rising": lambda i, m: i + 1.0,
    "falling": lambda i, m: (m - i).astype(np.float64),
}


@dataclasses.dataclass(frozen=True)
class FVT(Initialiser):
    """Composes rows of pieces.

    input, output: how pieces count in either plane: mean (the paper's), sum, first, last, rising (1 to m) or falling
    (m to 1). mergekit's "weighted_mean" is input=falling,output=rising, its "first_last" input=last,output=first.

    Tokens that are a part of a character are composed of its bytes; the published code falls back on them.
    """

    name: ClassVar[str] = "fvt"
    input: str = "mean"
    output: str = "mean"

    def __post_init__(self):
        config.check(self)
        for name in ("input", "output"):
            if getattr(self, name) not in _WEIGHTS:
                raise AtomError(f"{name}={getattr(self, name)}: expected one of {', '.join(_WEIGHTS)}")

    def rows(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """See Initialiser."""
        cuts = decompose(task.source, task.target, task.new, len(task.table))
        return self.compose(cuts, task.table), np.array([len(cut) > 0 for cut in cuts], bool)

    def compose(self, cuts: list[np.ndarray], table: np.ndarray) -> np.ndarray:
        """Rows f32 [m, n, d] of a table [v, n, d] for m lists of pieces; zeros for an empty one."""
        out = np.zeros((len(cuts), *table.shape[1:]), np.float32)
        sizes = np.array([len(cut) for cut in cuts], np.int64)
        full = np.flatnonzero(sizes)
        for part in blocks(len(full), 8192):
            rows = full[part]
            counts = sizes[rows]
            starts = np.cumsum(counts) - counts
            m = np.repeat(counts, counts)
            i = np.arange(counts.sum()) - np.repeat(starts, counts)
            pieces = table[np.concatenate([cuts[r] for r in rows])].astype(np.float32)
            for plane, how in zip(range(table.shape[1]), (self.input, self.output)):
                w = _WEIGHTS[how](i, m)
                if how != "sum":
                    w = w / np.repeat(np.add.reduceat(w, starts), counts)
                out[rows, plane] = np.add.reduceat(pieces[:, plane] * w[:, None].astype(np.float32), starts)
        return out


def decompose(source: ByteView, target: ByteView, ids: np.ndarray, rows: int) -> list[np.ndarray]:
    """The source tokens, i64 [pieces], that the bytes of each of these target tokens are cut into (special ones: the
    bytes of their names), without those that the source's table of so many rows doesn't hold."""
    out = []
    for i in ids.tolist():
        piece = target.pieces.get(i) or target.special.get(i, "").encode("utf-8")
        cut = np.array(source.cut(piece), np.int64)
        out.append(cut[cut < rows])
    return out
