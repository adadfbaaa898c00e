"""What a model says of tokens, given those before them and what a lasting memory puts in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.memory import Memory
from atom_jax.lasting import gate, inside
from atom_jax.models import registry
from atom_jax.session import laid_out
from atom_jax.session.prompts import padded
from atom_jax.session.session import Session
from atom_jax.typing import LM, AtomError

# Ids of a question and of its answer.
Asked = tuple[np.ndarray, np.ndarray]
# Tokens of another book that stand before those that are scored, and choose pages where something chooses.
BEFORE = 16


class Said(NamedTuple):
    """What a model says of a question and its answer, each token given the true ones before it. before: nats of the
    question's tokens but the first; hits: bool [n], which tokens of the answer are the likeliest; nats: f64 [n], of
    these."""

    before: float
    hits: np.ndarray
    nats: np.ndarray


def check(lm: LM, memory: Memory, chooses: bool, asked: list[Asked], passages: list[np.ndarray]) -> None:
    """AtomError where a memory, one row, and what is asked behind it exceed the model's positions."""
    of = inside.of(lm.config)
    if chooses and registry.of(lm.config).codec(lm.config).pending:
        raise AtomError(
            "lasting.choice: a model that sees a byte ahead is asked with all entries; make `whole` larger"
        )
    taken = int(memory_lib.nodes(memory)[-1].length[0])
    longest = max(len(passage) + len(q) + len(a) for passage, (q, a) in zip(passages, asked))
    if not of.units and taken + longest > of.limit:
        raise AtomError(
            f"lasting: {taken} entries and {longest} tokens exceed the {of.limit} positions of the model; make"
            " lasting.tokens, or lasting.choice.whole, smaller"
        )


def ask(
    lm: LM, front: Memory, chooses: bool, asked: list[Asked], passages: list[np.ndarray], batch: int
) -> list[Said]:  # fmt: skip
    """What is said of each question and answer, ids. front: what stands before each of them, of one row, and behind
    it passages, i32 [p] each. chooses: whether a question chooses among that."""
    out: list[Said] = []
    questions, answers = [len(p) + len(q) for p, (q, _) in zip(passages, asked)], [len(a) for _, a in asked]
    for at in range(0, len(asked), batch):
        # The last of them again, so that all calls have one shape.
        which = np.minimum(np.arange(at, at + batch), len(asked) - 1)
        cache = memory_lib.rows(front, np.zeros(batch, np.int32))
        ahead, some = [passages[i] for i in which], [asked[i] for i in which]
        longest = max(questions), max(answers)
        out += (_chosen_answers if chooses else _answers)(lm, cache, ahead, some, *longest)[: len(asked) - at]
    return out


def mixed(sides: Sequence[Said]) -> Said:
    """Of the mixture of these sides of one question (`lasting.gate`): nats are those of the mixture, and tokens are
    the likeliest of the side that the question makes likeliest, the first of equal ones."""
    before = np.array([side.before for side in sides])
    nats = gate.mixed(-before[:, None], np.stack([side.nats for side in sides])[:, None])[0]
    return Said(float(before.min()), sides[int(before.argmin())].hits, nats)


def another_book(ids: np.ndarray, windows: int, scored: int) -> list[Asked]:
    """So many windows of a text, i32 [n], evenly spaced, each of `scored` tokens behind BEFORE others. AtomError for
    a text that is too short."""
    n = BEFORE + scored
    if len(ids) < n:
        raise AtomError(f"lasting.later: a text of {len(ids)} tokens has no window of {n}")
    starts = np.linspace(0, len(ids) - n, windows).astype(int)
    return [(ids[a : a + BEFORE].astype(np.int32), ids[a + BEFORE : a + n].astype(np.int32)) for a in starts]


def _answers(
    lm: LM, cache: Memory, passages: list[np.ndarray], asked: list[Asked], question: int, answer: int
) -> list[Said]:  # fmt: skip
    """Of questions that are read with their answers in one call. question, answer: the lengths of the longest."""
    ids, lengths = padded([np.concatenate([p, q, a]) for p, (q, a) in zip(passages, asked)], question + answer)
    hits, nats = gate.said(lm, cache, ids, lengths)
    out = []
    for hit, nat, p, (q, a) in zip(hits, nats.astype(np.float64), passages, asked):
        start = len(p) + len(q) - 1
        out.append(Said(nat[len(p) : start].sum(), hit[start : start + len(a)], nat[start : start + len(a)]))
    return out


def _chosen_answers(
    lm: LM, cache: Memory, passages: list[np.ndarray], asked: list[Asked], question: int, answer: int
) -> list[Said]:  # fmt: skip
    """As `_answers`; the question chooses what its answer leans on."""
    questions = [np.concatenate([p, q]) for p, (q, _) in zip(passages, asked)]
    ids, lengths = padded(questions, question)
    copy = memory_lib.rows(cache, np.arange(len(asked)))
    before = gate.said(lm, copy, ids, lengths)[1].astype(np.float64)
    params = laid_out.scanned(lm)
    session = Session.begin(lm, ids, lengths, capacity=0, params=params, unroll=False, memory=cache)
    answers, counts = padded([a for _, a in asked], answer)
    logp = jax.nn.log_softmax(session.verify(answers, counts).logits, axis=-1)
    hit = np.asarray(logp.argmax(-1))[:, :-1] == answers
    nats = -np.asarray(jnp.take_along_axis(logp[:, :-1], jnp.asarray(answers)[..., None], axis=-1))[..., 0]
    nats = nats.astype(np.float64)
    return [
        Said(before[i, len(p) : len(p) + len(q) - 1].sum(), hit[i, : len(a)], nats[i, : len(a)])
        for i, (p, (q, a)) in enumerate(zip(passages, asked))
    ]
