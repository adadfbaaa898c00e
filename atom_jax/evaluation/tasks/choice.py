"""Multiple choice: the answer that the model finds most likely."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.loglik import Score
from atom_jax.evaluation.metrics import Result, proportion
from atom_jax.evaluation.tasks import requests
from atom_jax.evaluation.tasks.task import Plan, Planner, logprob
from atom_jax.typing import AtomError


@dataclasses.dataclass(frozen=True)
class ChoiceSettings(requests.Drawn):
    """limit, seed: see `requests.Drawn`.
    format: one of the task's request files ("": the first). rc: the answer's text; mc: its letter; 0 or 5 examples.
    """

    format: str = ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A set of `evaldata.FILES`, in one or more formats.

    acc:      the right answer has the greatest log-likelihood. Ties go to the first.
    acc_byte: the greatest log-likelihood per UTF-8 byte of the answer, without the spaces it begins with.
    acc_pmi:  the greatest log-likelihood minus that after the neutral context (doubled files only).
    """

    name: str
    formats: tuple[str, ...]
    settings = ChoiceSettings()

    def plan(self, settings: ChoiceSettings, encoder: Encoder) -> Plan:
        """The items of the chosen documents. Raises AtomError for an unknown format."""
        chosen = settings.format or self.formats[0]
        if chosen not in self.formats:
            raise AtomError(f"{self.name}.format={chosen}: expected one of {', '.join(self.formats)}")
        everything = requests.read(f"{self.name}/{chosen}")
        documents = [everything[i] for i in requests.subset(len(everything), settings.limit, settings.seed)]
        return compare(documents, encoder, {"format": chosen})


def compare(
    documents: Sequence[requests.Request],
    encoder: Encoder,
    notes: dict[str, Any],
    parts: dict[str, slice] | None = None,
) -> Plan:
    """The items of all answers, of which the likeliest are chosen. parts: documents whose `acc` is also given alone,
    as acc_NAME."""
    planner = Planner()
    answers = [[planner.pair(encoder, c, a) for c, a in zip(d.contexts, d.continuations)] for d in documents]
    neutral = [[planner.pair(encoder, d.neutral, a) for a in d.continuations] for d in documents if d.neutral]

    def summarize(scores: Sequence[Score]) -> Result:
        plain = [np.array([logprob(scores, a) for a in doc]) for doc in answers]
        alone = [np.array([logprob(scores, a) for a in doc]) for doc in neutral]
        result = accuracies(documents, plain, alone, notes | {"cut": planner.cut})
        for name, part in (parts or {}).items():
            result.metrics[f"acc_{name}"] = accuracies(documents[part], plain[part], [], {}).metrics["acc"]
        return result

    return Plan(planner.items, summarize)


def accuracies(
    documents: Sequence[requests.Request], plain: Sequence[np.ndarray], alone: Sequence[np.ndarray], notes: dict
) -> Result:
    """Accuracies from log-likelihoods, an array [choices] for each document; `alone` (after the neutral context) may
    be empty."""
    sizes = [np.array([max(1, len(a.strip().encode())) for a in d.continuations]) for d in documents]
    rules = {"acc": plain}
    if any(len(set(s.tolist())) > 1 for s in sizes):
        rules["acc_byte"] = [p / s for p, s in zip(plain, sizes)]
    if alone:
        rules["acc_pmi"] = [p - a for p, a in zip(plain, alone)]
    metrics = {
        name: proportion([int(np.argmax(v)) == d.gold for v, d in zip(values, documents)])
        for name, values in rules.items()
    }
    golds = np.bincount([d.gold for d in documents])
    chance = float(np.mean([1 / len(d.continuations) for d in documents]))
    return Result(metrics, len(documents), {"chance": chance, "majority": float(golds.max() / golds.sum()), **notes})
