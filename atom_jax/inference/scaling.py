"""Reasoning in several chains: a prompt is read once, continued many times, and the answers vote."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from atom_jax import config
from atom_jax.fields import Expression
from atom_jax.kvcache.dense import bucket
from atom_jax.session import laid_out, queue, sampling
from atom_jax.session.prompts import end_ids, padded, token_rows
from atom_jax.session.queue import Made
from atom_jax.session.session import Session
from atom_jax.typing import LM, AtomError

# Chains of a prompt.
MOST = 2**20
VOTES = ("majority", "verify")
STOPS = "none, decided, verified or first:M"


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """n prompts, W chains each.

    answers: what the vote says, None where no chain came to an answer. votes: [n][W], the chains' answers; None of a
    chain that did not end within its length, or that gives none. right: whether the answer is right, where the caller
    can tell. chains: [n][W], what was made, with what each step held and read. text: [n][W].
    stats: prompt_tokens, new_tokens, chains, finished, chains_cut (ended before, since the vote was decided);
    kv_reads: entries read by all chains, and kv_entries_peak: most that the chains of one prompt hold together when
    they go in step (both averaged over layers and key/value heads, prompts counted in every chain); row_steps: steps
    that were computed, and rows_idle: how many of them for rows that had ended; seconds.
    """

    answers: list[str | None]
    votes: list[list[str | None]]
    right: list[bool] | None
    chains: list[list[Made]] = dataclasses.field(repr=False)
    text: list[list[str]] = dataclasses.field(repr=False)
    stats: dict[str, float]


def reason(
    lm: LM,
    prompts: Any,
    chains: int = 8,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    key: Any = None,
    *,
    extract: Callable[[str], str | None],
    verify: Callable[[int, str], bool] | None = None,
    vote: str = "majority",
    stop: str = "none",
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_ids: Sequence[int] | None = None,
    rows: int = 64,
    on_end: Callable[[int, int, Made], None] | None = None,
) -> Reasoning:
    """Continues every prompt `chains` times and lets the answers vote.

    Chain w of a prompt draws with fold_in(its key, w), and sampling does not look at the limit: so fewer and
    shorter chains are parts of more and longer ones.

    Args:
      prompts, temperature, key, top_k, top_p, min_p, stop_ids: as of `generate`. max_new_tokens: of every chain, the
        stop id included.
      extract: the answer in the text of a chain that has ended, or None.
      verify: whether an answer to prompt number p is right, where that can be checked.
      vote: "majority", the most frequent answer, of equally frequent ones that of the lowest chain; "verify", the
        first answer that `verify` accepts, else the majority's.
      stop: "none"; "decided" ends the chains of a prompt once their answers can't change the majority's; "first:M"
        once M chains have answered; "verified" once `verify` accepts an answer.
      rows: chains at a time. on_end: called with (prompt, chain, what was made) as chains end.
    Raises AtomError for what `generate` refuses, and for options out of their range.
    """
    began = time.perf_counter()
    chains = config.whole("chains", chains, 1, MOST)
    most = config.whole("max_new_tokens", max_new_tokens, 1)
    rows = config.whole("rows", rows, 1)
    enough = _enough(stop, verify)
    if lm.tokenizer is None:
        raise AtomError("this model has no tokenizer: answers are found in texts")
    if vote not in VOTES or (vote == "verify" and verify is None):
        raise AtomError(f"vote={vote}: expected majority, or verify where answers can be checked")
    ids = token_rows(lm, prompts, first=True)
    longest = max(map(len, ids))
    if longest + most > lm.config.max_length:
        raise AtomError(
            f"a prompt of {longest} tokens and chains of {most} exceed the {lm.config.max_length} positions of the"
            " model"
        )
    groups = [_Group(p, chains, enough, verify) for p in range(len(ids))]
    lock = threading.Lock()

    def ended(number: int, made: Made) -> list[int]:
        p, w = divmod(number, chains)
        said = extract(lm.tokenizer.decode(made.ids)) if made.ended else None
        with lock:
            if on_end is not None:
                on_end(p, w, made)
            return [p * chains + other for other in groups[p].take(w, said)]

    session = Session.begin(
        lm, *padded(ids), capacity=bucket(longest + 1), params=laid_out.of(lm), unroll=laid_out.unrolls(lm)
    )
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    keys = fold(sampling.row_keys(key, len(ids)), np.arange(chains)).reshape(-1)
    how = sampling.sampler(temperature, top_k, top_p, min_p)
    made, stats = queue.run(
        session, np.repeat(np.arange(len(ids)), chains), keys, how, end_ids(lm, stop_ids), most, rows, ended
    )
    found = [made[p * chains : (p + 1) * chains] for p in range(len(ids))]
    answers = [group.answer(vote) for group in groups]
    cost = {"prompt_tokens": int(sum(map(len, ids))), **_stats(found, stats), "seconds": time.perf_counter() - began}
    right = None if verify is None else [a is not None and verify(p, a) for p, a in enumerate(answers)]
    text = [[lm.tokenizer.decode(one.ids) for one in group] for group in found]
    return Reasoning(answers, [group.votes for group in groups], right, found, text, cost)


def _stats(found: list[list[Made]], stats: queue.Stats) -> dict[str, float]:
    every = [one for group in found for one in group]
    return {
        "new_tokens": sum(len(one.ids) for one in every), "chains": len(every),
        "finished": sum(one.ended for one in every), "chains_cut": sum(one.cut for one in every),
        "kv_reads": float(sum(one.read.astype(np.float64).sum() for one in every)),
        "kv_entries_peak": max(peak([one.held for one in group]) for group in found),
        "row_steps": stats.row_steps, "rows_idle": stats.idle,
    }  # fmt: skip


def peak(held: Sequence[np.ndarray]) -> float:
    """Most entries that chains hold together when they go in step, each until it ends. held: f32 [steps] of each."""
    total = np.zeros(max(map(len, held), default=0))
    for one in held:
        total[: len(one)] += one
    return float(total.max(initial=0.0))


def majority(votes: Sequence[str | None]) -> str | None:
    """The most frequent answer, of equally frequent ones the earliest."""
    counts = collections.Counter(vote for vote in votes if vote is not None)
    return max(counts, key=counts.get) if counts else None


def last_match(pattern: str) -> Callable[[str], str | None]:
    """What finds an answer in a text: the last match of a regular expression (its first group, where it has one), or
    with "boxed" what stands in the last \\boxed{...}. Raises AtomError for a pattern that is none, and, when it is
    used, for one that takes too long."""
    if pattern == "boxed":
        return _boxed
    return Expression(pattern, "--answer").last


def _boxed(text: str) -> str | None:
    at = text.rfind("\\boxed{")
    if at < 0:
        return None
    depth, start = 0, at + len("\\boxed{")
    for i in range(start, len(text)):
        if text[i] == "}" and not depth:
            return text[start:i].strip()
        depth += {"{": 1, "}": -1}.get(text[i], 0)
    return None


class _Group:
    """The chains of one prompt: what they said, and whether that is enough."""

    def __init__(
        self, number: int, chains: int, enough: Callable[[_Group], bool], verify: Callable[[int, str], bool] | None
    ):
        self.number, self.enough, self.verify = number, enough, verify
        self.votes: list[str | None] = [None] * chains
        self.alive = set(range(chains))

    def take(self, chain: int, said: str | None) -> list[int]:
        """Takes the answer of a chain; returns the chains that are to end."""
        if chain not in self.alive:
            return []
        self.alive.remove(chain)
        self.votes[chain] = said
        if not self.alive or not self.enough(self):
            return []
        others, self.alive = sorted(self.alive), set()
        return others

    @property
    def decided(self) -> bool:
        """Whether the chains alive can't change the majority."""
        counts = [n for _, n in collections.Counter(filter(None, self.votes)).most_common(2)]
        first, second = (*counts, 0, 0)[:2]
        return first > second + len(self.alive)

    @property
    def right(self) -> str | None:
        """The first answer that is right."""
        return next((v for v in self.votes if v is not None and self.verify(self.number, v)), None)

    def answer(self, vote: str) -> str | None:
        """What the vote says."""
        return (self.right if vote == "verify" else None) or majority(self.votes)


def _enough(stop: str, verify: Any) -> Callable[[_Group], bool]:
    """What says of a group that its other chains are to end."""
    if stop == "none":
        return lambda group: False
    if stop == "decided":
        return lambda group: group.decided
    if stop == "verified" and verify is not None:
        return lambda group: group.right is not None
    if stop == "verified":
        raise AtomError("stop=verified: nothing can check the answers here")
    name, _, number = stop.partition(":")
    if name != "first" or not number.isdecimal() or not int(number):
        raise AtomError(f"stop={stop}: expected {STOPS}")
    return lambda group: sum(v is not None for v in group.votes) >= int(number)
