"""TokenAdapt: a mean of a token's pieces and one of its nearest source tokens, both weighed by what an embedder of
texts says (Sharthak et al., 2025, 2505.09738; from its published code)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from atom_jax import config
from atom_jax.transfer.initialisers.base import Initialiser, Task, blocks, mix, mix_at, softmax, texts, top, unit
from atom_jax.transfer.initialisers.fvt import FVT, decompose


@dataclasses.dataclass(frozen=True)
class TokenAdapt(Initialiser):
    """Uses `embed`; where that is not given, a text's vector is the mean of the source's input rows of its pieces
    (the paper's is nomic-embed-text-v2-moe).

    share: of the mean of near tokens, against that of pieces. neighbours: how many are near. temperature: of both.
    """

    name: ClassVar[str] = "tokenadapt"
    share: float = 0.3
    neighbours: int = 3
    temperature: float = 0.3

    def __post_init__(self):
        config.check(self, share=(0, 1), neighbours=(1, 10_000), temperature=(1e-6, 1e6))

    def rows(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """See Initialiser."""
        known = np.array(sorted(i for i in task.source.pieces if i < len(task.table)), np.int64)
        cuts = decompose(task.source, task.target, task.new, len(task.table))
        theirs, ours = self._vectors(task, known, cuts)
        place = np.full(len(task.table), -1)
        place[known] = np.arange(len(known))
        lengths = np.array([len(text) for text in texts(task.source, known)])
        words = texts(task.target, task.new)
        local = np.zeros((len(task.new), *task.table.shape[1:]), np.float32)
        for i, (cut, word) in enumerate(zip(cuts, words)):
            if len(cut := cut[place[cut] >= 0]):
                alike = softmax(theirs[place[cut]] @ ours[i])
                share = lengths[place[cut]] / max(len(word), 1)
                local[i] = mix(softmax((alike + share) / 2 / self.temperature)[None], task.table[cut])[0]
        has_local = np.array([bool((place[cut] >= 0).any()) for cut in cuts], bool)
        has_global = np.abs(ours).sum(1) > 0
        far = np.zeros_like(local)
        for part in blocks(len(task.new)):
            near, at = top(ours[part] @ theirs.T, self.neighbours)
            far[part] = mix_at(softmax(near / self.temperature), known[at], task.table)
        weight = np.where(has_local & has_global, self.share, has_global.astype(np.float32))[:, None, None]
        return ((1 - weight) * local + weight * far).astype(np.float32), has_local | has_global

    def _vectors(self, task: Task, known: np.ndarray, cuts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Of the source tokens `known` and of the new ones, of length 1."""
        if (embed := task.aux.embed) is not None:
            both = embed(texts(task.source, known)), embed(texts(task.target, task.new))
            return unit(np.asarray(both[0])), unit(np.asarray(both[1]))
        inputs = task.table[:, :1]
        return unit(inputs[known, 0]), unit(FVT().compose(cuts, inputs)[:, 0])
