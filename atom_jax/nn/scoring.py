"""What a model's distributions say at every position: cross-entropy, entropy, hits, divergence from a teacher.

Logits are made one block of positions at a time, and in the backward pass again: those of all positions of a large
vocabulary never exist together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.params import Tree
from atom_jax.sharding import constrain, length_shards

# Logits per device above which they are computed block by block: 128 MiB in float32.
LIMIT = 2**25

# States [b, n, d] -> logits float32 [b, n, v].
Head = Callable[[jax.Array], jax.Array]


class _Block:
    """The logits of some positions, and what several statistics need of them."""

    def __init__(self, logits_btv: jax.Array, targets_bt: Any, teacher_btv: Any, among: Sequence[int]):
        self.logits, self.targets, self.among = logits_btv, targets_bt, among
        self._teacher = teacher_btv

    @functools.cached_property
    def log_z(self) -> jax.Array:
        return jax.nn.logsumexp(self.logits, axis=-1)

    @functools.cached_property
    def logp(self) -> jax.Array:
        return jax.nn.log_softmax(self.logits, axis=-1)

    @functools.cached_property
    def teacher(self) -> jax.Array:
        return jax.nn.log_softmax(self._teacher, axis=-1)

    def nats(self) -> jax.Array:
        # A comparison instead of a gather: it stays local when the vocabulary is sharded, and so does its gradient.
        here = jax.lax.broadcasted_iota(jnp.int32, self.logits.shape, 2) == self.targets[..., None]
        return self.log_z - jnp.sum(jnp.where(here, self.logits, 0.0), axis=-1)

    def of_some(self) -> jax.Array:
        # A mask, since the ids may be half the vocabulary: a gather's gradient is a scatter of as many.
        chosen = np.zeros(self.logits.shape[-1], bool)
        chosen[list(self.among)] = True
        return jax.nn.logsumexp(self.logits, axis=-1, where=jnp.asarray(chosen)[None, None]) - self.log_z


STATISTICS: dict[str, Callable[[_Block], jax.Array]] = {
    "nats": _Block.nats,
    "log_z": lambda s: s.log_z,
    "entropy": lambda s: entropy(s.logp),
    "hit": lambda s: jnp.argmax(s.logits, axis=-1) == s.targets,
    "among": _Block.of_some,
    "reverse": lambda s: jnp.sum(jnp.exp(s.logp) * (s.logp - s.teacher), axis=-1),
    "forward": lambda s: jnp.sum(jnp.exp(s.teacher) * (s.teacher - s.logp), axis=-1),
    "agree": lambda s: jnp.argmax(s.logp, axis=-1) == jnp.argmax(s.teacher, axis=-1),
}


def score(
    head: Head,
    x_btd: jax.Array,
    targets_bt: jax.Array | None = None,
    want: Sequence[str] = ("nats",),
    *,
    teacher: tuple[Head, jax.Array] | None = None,
    among: Sequence[int] = (),
    block: int | None = None,
) -> dict[str, jax.Array]:
    """The wanted statistics by name, each [b, t], of the distributions after final states x_btd.

    nats: f32, cross-entropy of `targets_bt` (i32 [b, t]), minus their log-probability; hit: bool, whether the target
    is the likeliest. log_z: f32, log-partition function. entropy: f32, in nats. among: f32, log-probability that one
    of the ids `among` comes next. Next to a teacher (its head, its states [b, t, d]): forward, KL(teacher || this),
    and reverse, KL(this || teacher), f32 in nats; agree: bool, whether both think the same id likeliest.

    block: positions of a row whose logits exist at once; None: as many as LIMIT allows.
    """
    b, t, d = x_btd.shape
    teach, y_btd = teacher or (None, None)

    def run(x: jax.Array, targets: jax.Array | None, y: jax.Array | None) -> dict[str, jax.Array]:
        seen = _Block(head(x), targets, None if teach is None else teach(y), among)
        return {name: STATISTICS[name](seen) for name in want}

    inputs = x_btd, targets_bt, y_btd
    if block is None:
        one = jax.eval_shape(head, jax.ShapeDtypeStruct((b, 1, d), x_btd.dtype))
        block = positions_per_block(b, t, one.shape[-1])
    if block >= t:
        return run(*inputs)
    parts = jax.tree.map(lambda a: blocks(a, block), inputs)
    step = jax.checkpoint(lambda _, part: (None, run(*part)), prevent_cse=False)
    return {name: joined(a, t) for name, a in jax.lax.scan(step, None, parts)[1].items()}


def entropy(logp: jax.Array) -> jax.Array:
    """Entropies [...] in nats of distributions given by log-probabilities [..., v]."""
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def gathered(params: Tree) -> Tree:
    """`params`, with tables of the vocabulary gathered along the width here, once for all blocks of logits."""
    axes = {"embed": ("vocab", None), "unembed": (None, "vocab")}
    return {k: constrain(p, *axes[k]) if k in axes else p for k, p in params.items()}


def positions_per_block(b: int, t: int, v: int) -> int:
    """Positions of every row whose logits fit LIMIT, at least one."""
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    return t if b * t * v <= LIMIT * devices else max(LIMIT * devices // (b * v), 1)


def blocks(x: jax.Array, block: int) -> jax.Array:
    """[b, t, ...] to [n, b, block, ...], padded with zeros. Where the positions of a row are spread over devices,
    every block has some from each of them."""
    b, t = x.shape[:2]
    shards = length_shards(t)
    block = max(block // shards, 1)
    x = x.reshape(b, shards, t // shards, *x.shape[2:])
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % block)] + [(0, 0)] * (x.ndim - 3))
    x = jnp.moveaxis(x.reshape(b, shards, -1, block, *x.shape[3:]), 2, 0)
    x = x.reshape(-1, b, shards * block, *x.shape[4:])
    return constrain(x, None, "batch", "length", *[None] * (x.ndim - 3))


def joined(x_nbt: jax.Array, t: int) -> jax.Array:
    """The inverse of `blocks` for rows of t positions: [n, b, block] to [b, t]."""
    n, b, block = x_nbt.shape
    shards = length_shards(t)
    x = jnp.moveaxis(x_nbt.reshape(n, b, shards, block // shards), 0, 2)
    return constrain(x.reshape(b, shards, -1)[:, :, : t // shards].reshape(b, t), "batch", "length")
