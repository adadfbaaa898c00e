"""Rows of ragged batches next to themselves alone, over two turns: for every family with every cache policy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import params
from atom_jax.inference.score import apply, to_batch
from atom_jax.kvcache import memory
from atom_jax.kvcache.budget import BudgetLayer, tied
from atom_jax.kvcache.policies import POLICIES
from atom_jax.kvcache.policy import policies_of
from atom_jax.models import bolmo, registry
from atom_jax.models.bolmo import BolmoConfig
from atom_jax.models.bolmo.config import FUSED
from atom_jax.models.hnet import HNetConfig
from atom_jax.session.prompts import padded
from atom_jax.session.session import Session
from atom_jax.typing import LM
from tests.kvcache.tiny import small
from tests.models.tiny_units import stream, weights

STEPS = 3
# What policies need besides, and the hardest forms of those that learn.
SETTINGS = {"separators": tuple(range(32, 48)), "heads": ((0, 0), (1, 1))}
HARDEST = {"dms": {"form": "observed"}, "revised": {"form": "observed"}, "dmc": {"form": "adapter", "mass": True}}


def policy(name: str, budget: int = 6) -> Any:
    """A policy that keeps little."""
    return small(POLICIES[name], budget, **SETTINGS, **HARDEST.get(name, {}))


def cases(examples: int | None = None) -> Iterator[tuple[str, str, str]]:
    """(family, example, policy) of all that go together. examples: so many of each family; None: all."""
    for family in registry.FAMILIES.values():
        for example, cfg in list(family.examples().items())[:examples]:
            for name in POLICIES:
                if _takes(cfg, policy(name)):
                    yield family.name, example, name


def _takes(cfg: Any, chosen: Any) -> bool:
    family = registry.of(cfg)
    cache = jax.eval_shape(lambda: family.init_cache(family.with_memory(cfg, chosen), 1, 1))
    return set(policies_of(chosen)) <= set(memory.policies(cache))


@functools.cache
def _parameters(cfg: Any) -> Any:
    tree = weights(cfg) if isinstance(cfg, HNetConfig) else params.init(jax.random.key(3), registry.of(cfg).spec(cfg))
    flat, learned = params.flatten(tree), registry.learned(cfg)
    for i, (path, x) in enumerate(flat.items()):
        # Decisions of which about half are against a token, and ends of units that differ between positions.
        if (path in learned and not path.endswith("norm")) or path.startswith("rule/"):
            flat[path] = jax.random.normal(jax.random.key(i), x.shape)
    return params.unflatten(flat)


def plain(family: str, example: str) -> LM:
    """The example as it is."""
    cfg = registry.FAMILIES[family].examples()[example]
    return LM(cfg, _parameters(cfg), None)


def model(family: str, example: str, name: str, budget: int = 6) -> LM:
    """The example with the policy."""
    record = registry.FAMILIES[family]
    cfg = record.with_memory(record.examples()[example], policy(name, budget))
    return LM(cfg, _parameters(cfg), None)


def texts(cfg: Any, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Two turns of three rows; one of the first turn is much longer. Every second time of few different ids."""
    rng = np.random.default_rng(seed)

    def row(n: int) -> list[int]:
        if isinstance(cfg, HNetConfig):
            return stream(n, int(rng.integers(60))).tolist()
        first = 4 if isinstance(cfg, BolmoConfig) else 0
        return (first + rng.integers(*((30, 36) if seed % 2 else (0, 250)), n)).tolist()

    lengths = [int(rng.integers(17, 33)), int(rng.integers(9, 17)), int(rng.integers(1, 17))]
    return [row(n) for n in rng.permutation(lengths)], [row(int(n)) for n in rng.integers(STEPS + 1, 13, 3)]


def whole(lm: LM, prompts: list[list[int]], made: list[list[int]]) -> np.ndarray:
    """Logits [rows, t, v] where prompts and what was made of them greedily are read at once. In what a Bolmo made,
    ids say where patches end; its predictor, which sees the next byte, says so in prompts."""
    ids, lengths = padded([np.array(prompt + new) for prompt, new in zip(prompts, made)])
    mask = np.arange(ids.shape[1])[None] < lengths[:, None]
    if not isinstance(lm.config, BolmoConfig):
        return np.array(apply(lm, ids, mask).logits)
    plain, rows, last = ids % FUSED, np.arange(len(ids)), np.array([len(prompt) - 1 for prompt in prompts])
    batch = to_batch(lm, plain, mask)
    ends = np.asarray(_bolmo(lm.params, batch, None, cfg=lm.config)[1])
    ends = np.where(np.arange(ids.shape[1])[None] > last[:, None], ids >= FUSED, ends)
    # Of a prompt's last byte the likelier form counts; a text's first byte ends a patch.
    before, said = np.asarray(_bolmo(lm.params, batch, ends, cfg=lm.config)[0])[rows, last - 1], plain[rows, last]
    ends[rows, last] = (last == 0) | (before[rows, said + FUSED] > before[rows, said])
    return np.array(_bolmo(lm.params, batch, ends, cfg=lm.config)[0])


@functools.partial(jax.jit, static_argnames="cfg")
def _bolmo(p: Any, batch: Any, ends: Any, *, cfg: BolmoConfig) -> tuple[jax.Array, jax.Array]:
    x_btd, _, aux = bolmo.hidden(p, batch, cfg=cfg, ends=ends)
    return bolmo.logits(p, x_btd, cfg=cfg), aux["boundaries"][0]


def difference(lm: LM, seed: int) -> str:
    """In what the shorter rows of a batch differ from themselves alone, in buffers of their own; "" where they don't.

    Positions that are kept are compared exactly, logits to 1e-3 of the largest: norms multiply what rounding makes of
    small vectors by up to 316, as their epsilon is 1e-5 (what differed by
    4e-4 differed by 1e-5 in double precision)."""
    first, second = texts(lm.config, seed)
    alone = lambda row: (first[row : row + 1], second[row : row + 1])  # noqa: E731
    together = list(_read(lm, first, second, 32, _seen))
    for row in range(3):
        if len(first[row]) > 16:
            continue
        for (what, logits, held), (_, own, mine) in zip(together, _read(lm, *alone(row), 16, _seen)):
            where = f"seed {seed}, row {row}, {what}"
            if held[row] != mine[0]:
                return f"{where}: keeps {held[row]}, and alone {mine[0]}"
            if not np.allclose(logits[row], own[0], atol=1e-3 * np.abs(own).max()):
                return f"{where}: logits differ by {np.abs(logits[row] - own[0]).max():.1e}"
    return ""


def _read(
    lm: LM, first: list[list[int]], second: list[list[int]], width: int, look: Callable[[Session], tuple]
) -> Iterator[tuple]:
    """What `look` finds after the prompts, after each of some single tokens, after the rest of the second turn, and
    after each of the same single tokens again."""
    ids, lengths = padded([np.array(row) for row in first], width)
    session = Session.begin(lm, ids, lengths, capacity=3 * width, params=lm.params, unroll=False)
    yield "the prompt", *look(session)
    for turn in ("first", "second"):
        for i in range(STEPS):
            session = session.step(np.array([row[i] for row in second], np.int32))
            yield f"step {i} of the {turn} turn", *look(session)
        if turn == "first":
            ids, lengths = padded([np.array(row[STEPS:]) for row in second], 8)
            session, _ = session.read(ids, lengths)
            yield "the second turn", *look(session)


def _layers(session: Session) -> Iterator[tuple[memory.Memory, BudgetLayer]]:
    """Those with a budget, with the nodes that they belong to."""
    for node in memory.nodes(session.memory):
        for x in jax.tree.leaves(node.layers, is_leaf=lambda x: isinstance(x, memory.Stack | BudgetLayer)):
            layer = x.states if isinstance(x, memory.Stack) else x
            if isinstance(layer, BudgetLayer):
                yield from (
                    (node, one) for one in (params.unstack(layer) if isinstance(x, memory.Stack) else (layer,))
                )


def _seen(session: Session) -> tuple[np.ndarray, list[list[list[int]]]]:
    """Logits, and for every row the positions that the heads of layers with a budget hold."""
    held: list[list[list[int]]] = [[] for _ in session.token]
    for _, layer in _layers(session):
        for row, heads in zip(held, np.asarray(layer.pos)):
            row += [sorted(head[head >= 0].tolist()) for head in heads]
    return np.asarray(session.logits), held


def flips(lm: LM, seed: int, digits: Sequence[int]) -> tuple[int, np.ndarray]:
    """How many times heads of the shorter rows rank what they hold, and how many of these ranks are others alone: of
    two entries, which is above, or whether they are `tied` where so many binary digits count. lm: with room for
    everything."""
    first, second = texts(lm.config, seed)
    together = list(_read(lm, first, second, 32, _scores))
    total, found = 0, np.zeros(len(digits), int)
    for row in range(3):
        if len(first[row]) > 16:
            continue
        alone = _read(lm, first[row : row + 1], second[row : row + 1], 16, _scores)
        for (_, scores), (_, own) in zip(together, alone):
            for a, b in zip(scores[row], own[0]):
                total += 1
                found += [bool((_above(a, n) != _above(b, n)).any()) for n in digits]
    return total, found


def _above(score: np.ndarray, digits: int) -> np.ndarray:
    """Of every pair of entries, int [n, n]: whether the first is above the second (1), below it (-1), or tied (0)."""
    some, other = jnp.asarray(score)[:, None], jnp.asarray(score)[None]
    return np.where(np.asarray(tied(some, other, digits)), 0, 1 * (some > other) - (some < other))


def _scores(session: Session) -> tuple[list[list[np.ndarray]]]:
    """For every row and head the scores of its entries, by position."""
    found: list[list[np.ndarray]] = [[] for _ in session.token]
    for node, layer in _layers(session):
        score = layer.policy.guarded(layer.entries, node.length - 1, layer.limit)
        for row, scores, places in zip(found, np.asarray(score), np.asarray(layer.pos)):
            row += [s[np.argsort(p)[np.sum(p < 0) :]] for s, p in zip(scores, places)]
    return (found,)
