"""Bits per byte of running text: the measure that models with different tokenizers share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from atom_jax import config
from atom_jax.data.config import SPLITS
from atom_jax.data.corpus import Corpus
from atom_jax.data.sources import open_source
from atom_jax.evaluation.encode import Encoder, Item
from atom_jax.evaluation.loglik import Score
from atom_jax.evaluation.metrics import Result, ratio
from atom_jax.evaluation.tasks import requests
from atom_jax.evaluation.tasks.task import Plan
from atom_jax.typing import AtomError

# Fewer documents than this give no useful standard error: windows are the unit then.
_DOCUMENTS = 30
_OF_ENDLESS = 1024


@dataclasses.dataclass(frozen=True)
class BpbSettings:
    """What text, and how it is cut.

    sources: as in DataConfig.sources; (): those that a training directory was trained on, else "austen". Of those
        without an end, the first 1,024 documents.
    split: "train", "validation", "test" or "all" (for a single file).
    context: every token is given at least this many tokens before it, fewer only at the beginning of a document
        (0: half of what the model sees at once).
    limit: windows to draw at random with `seed` (0: all).
    """

    sources: tuple[str, ...] = ()
    split: str = "validation"
    context: int = 0
    limit: int = 0
    seed: int = 0

    def __post_init__(self):
        count = (0, 2**31 - 1)
        config.check(self, context=count, limit=count, seed=count)


@dataclasses.dataclass(frozen=True)
class TextBpb:
    """bpb: nats of all tokens / ln 2 / UTF-8 bytes of the text. Neither bos nor eos is counted."""

    settings = BpbSettings()

    def plan(self, settings: BpbSettings, encoder: Encoder) -> Plan:
        """The windows of all documents of the sources."""
        items: list[Item] = []
        sizes: list[int] = []
        owner: list[int] = []
        context = settings.context or max(1, encoder.length // 2)
        if settings.split not in SPLITS:
            raise AtomError(f"bpb.split={settings.split}: expected one of {', '.join(SPLITS)}")
        corpora = [open_source(source, settings.split) for source in settings.sources]
        for number, (corpus, i) in enumerate((c, i) for c in corpora for i in range(_documents(c))):
            cut, nbytes = encoder.document(corpus.read(i), context)
            items += cut
            sizes += nbytes
            owner += [number] * len(cut)
        if not items:
            raise AtomError(f"bpb.sources={','.join(settings.sources)}: the tokenizer makes no token of their text")
        chosen = requests.subset(len(items), settings.limit, settings.seed)
        nbytes, owners = np.array(sizes, np.float64)[chosen], np.array(owner)[chosen]

        def summarize(scores: Sequence[Score]) -> Result:
            bits = np.array([-s.logprob for s in scores]) / math.log(2)
            return _result(bits, nbytes, owners)

        return Plan([items[i] for i in chosen], summarize)


def _documents(corpus: Corpus) -> int:
    """How many of a source are read."""
    return min(len(corpus), _OF_ENDLESS) if getattr(corpus, "endless", False) else len(corpus)


def _result(bits: np.ndarray, nbytes: np.ndarray, owners: np.ndarray) -> Result:
    _, documents = np.unique(owners, return_inverse=True)
    unit = documents if documents.max() + 1 >= _DOCUMENTS else np.arange(len(bits))
    metric = ratio(np.bincount(unit, bits), np.bincount(unit, nbytes))
    notes = {"documents": int(documents.max() + 1), "bytes": int(nbytes.sum()), "bits": float(bits.sum())}
    return Result({"bpb": metric}, len(bits), notes)
