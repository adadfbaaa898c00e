"""What a model says of tokens, given those before them and what a lasting memory puts in front."""

from __future__ import annotations

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

# Ids of a question and of its answer; of the answer's tokens, which are the likeliest, and their nats.
Asked = tuple[np.ndarray, np.ndarray]
Said = tuple[np.ndarray, np.ndarray]
# Tokens of another book that stand before those that are scored, and choose pages where something chooses.
BEFORE = 16


def ask(
    lm: LM, fronts: gate.Fronts, chooses: bool, asked: list[Asked], passages: list[np.ndarray], batch: int,
    gated: bool,
) -> list[Said]:  # fmt: skip
    """For each question and answer, ids: which tokens of the answer are the likeliest, bool [n], and their nats, f64
    [n], each given the true ones before it. fronts: what may stand in front of every question; passages: i32 [p] of
    each, what is read again. gated: nats are those of the mixture of all sides of `lasting.gate`, and tokens are the
    likeliest of the side that its question makes likeliest; else all have memory and passages in front. chooses:
    whether a question chooses among the memory. AtomError where both exceed the model's positions."""
    of = inside.of(lm.config)
    if chooses and registry.of(lm.config).codec(lm.config).pending:
        raise AtomError(
            "lasting.choice: a model that sees a byte ahead is asked with all entries; make `whole` larger"
        )
    behind = [(np.concatenate([passage, q]), a) for passage, (q, a) in zip(passages, asked)]
    taken, longest = int(memory_lib.nodes(fronts.memory)[-1].length[0]), max(len(q) + len(a) for q, a in behind)
    if not of.units and taken + longest > of.limit:
        raise AtomError(
            f"lasting: {taken} entries and {longest} tokens exceed the {of.limit} positions of the model; make"
            " lasting.tokens, or lasting.choice.whole, smaller"
        )
    first = np.array(getattr(lm.tokenizer, "front", ()), np.int32)
    alone = [(np.concatenate([first, q]), a) for q, a in asked]
    sides = [(fronts.memory, asked), (fronts.memory, behind), (fronts.near, asked), (fronts.nothing, alone)]
    answers, out = _chosen_answers if chooses else _answers, []
    for at in range(0, len(asked), batch):
        # The last of them again, so that all calls have one shape.
        which = np.minimum(np.arange(at, at + batch), len(asked) - 1)
        weight = np.full((len(gate.Side), batch), -np.inf)
        weight[gate.Side.PASSAGES] = 0
        if gated:
            some = ([of[i][0] for i in which] for of in (asked, alone))
            weight = -gate.weigh(lm, fronts, *some, [passages[i] for i in which])
        mine = [side for side, ahead in enumerate(weight) if np.isfinite(ahead).any()]
        said = [
            answers(lm, memory_lib.rows(front, np.zeros(batch, np.int32)), [texts[i] for i in which], texts)
            for front, texts in (sides[side] for side in mine)
        ]
        for row, ahead in enumerate(weight[mine].T[: len(asked) - at]):
            hits, nats = zip(*(side[row] for side in said))
            nats = gate.mixed(ahead[:, None], np.stack(nats).astype(np.float64)[:, None])[0]
            out.append((hits[int(ahead.argmax())], nats))
    return out


def another_book(ids: np.ndarray, windows: int, scored: int) -> list[Asked]:
    """So many windows of a text, i32 [n], evenly spaced, each of `scored` tokens behind BEFORE others. AtomError for
    a text that is too short."""
    n = BEFORE + scored
    if len(ids) < n:
        raise AtomError(f"lasting.later: a text of {len(ids)} tokens has no window of {n}")
    starts = np.linspace(0, len(ids) - n, windows).astype(int)
    return [(ids[a : a + BEFORE].astype(np.int32), ids[a + BEFORE : a + n].astype(np.int32)) for a in starts]


def _answers(lm: LM, cache: Memory, some: list[Asked], asked: list[Asked]) -> list[Said]:
    """Of some of all questions, read with their answers in one call."""
    ids, lengths = padded([np.concatenate(both) for both in some], max(len(q) + len(a) for q, a in asked))
    hits, nats = gate.said(lm, cache, ids, lengths)
    parts = [slice(len(q) - 1, len(q) + len(a) - 1) for q, a in some]
    return [(hits[i, part], nats[i, part]) for i, part in enumerate(parts)]


def _chosen_answers(lm: LM, cache: Memory, some: list[Asked], asked: list[Asked]) -> list[Said]:
    """As `_answers`; the question chooses what its answer leans on."""
    ids, lengths = padded([q for q, _ in some], max(len(q) for q, _ in asked))
    params = laid_out.scanned(lm)
    session = Session.begin(lm, ids, lengths, capacity=0, params=params, unroll=False, memory=cache)
    answers, counts = padded([a for _, a in some], max(len(a) for _, a in asked))
    logp = jax.nn.log_softmax(session.verify(answers, counts).logits, axis=-1)
    hit = np.asarray(logp.argmax(-1))[:, :-1] == answers
    nats = -np.asarray(jnp.take_along_axis(logp[:, :-1], jnp.asarray(answers)[..., None], axis=-1))[..., 0]
    return [(hit[i, :n], nats[i, :n]) for i, n in enumerate(counts)]
