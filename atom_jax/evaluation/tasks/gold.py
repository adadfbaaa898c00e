"""Tasks with one continuation per document: LAMBADA's last word, and bits per byte of reference answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.loglik import Score
from atom_jax.evaluation.metrics import Metric, Result, mean, perplexity, proportion, ratio
from atom_jax.evaluation.tasks import requests
from atom_jax.evaluation.tasks.task import Plan, Planner, Scored, greedy, logprob


@dataclasses.dataclass(frozen=True)
class Gold:
    """A file of `evaldata.FILES` with one continuation per document.

    bpb:      bits per UTF-8 byte of all continuations together.
    bpb_mean: mean over documents of their bits per byte.
    last_word adds
    acc:      every token of the word is the likeliest. None of them says that the word ends, so "sign" may be right
              where the model would write "signs", and more so the shorter the tokens: bytes at the extreme.
    ppl:      exp of the mean negative log-likelihood of the word, whatever its number of tokens.
    """

    file: str
    last_word: bool = False
    settings = requests.Drawn()

    def plan(self, settings: requests.Drawn, encoder: Encoder) -> Plan:
        """The items of the chosen documents."""
        everything = requests.read(self.file)
        chosen = requests.subset(len(everything), settings.limit, settings.seed)
        planner = Planner()
        answers = [planner.pair(encoder, everything[i].contexts[0], everything[i].continuations[0]) for i in chosen]

        def summarize(scores: Sequence[Score]) -> Result:
            metrics = _last_word(scores, answers) if self.last_word else {}
            return Result(metrics | _bits(scores, answers), len(answers), {"cut": planner.cut})

        return Plan(planner.items, summarize)


def _last_word(scores: Sequence[Score], answers: Sequence[Scored]) -> dict[str, Metric]:
    nats = [-logprob(scores, a) for a in answers]
    return {"acc": proportion([greedy(scores, a) for a in answers]), "ppl": perplexity(nats)}


def _bits(scores: Sequence[Score], answers: Sequence[Scored]) -> dict[str, Metric]:
    bits = [-logprob(scores, a) / math.log(2) for a in answers]
    sizes = [a.nbytes for a in answers]
    return {"bpb": ratio(bits, sizes), "bpb_mean": mean([b / n for b, n in zip(bits, sizes)])}
