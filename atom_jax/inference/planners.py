"""Planners: which actions promise most, among futures that a model of the world (or the world itself) imagines.

A planner is a frozen configuration, written as "cem:n=64,iterations=4". It asks `Futures`, so it knows nothing of
models, and goes into compiled programs. Letters: b rows, n futures of each, h steps, a actions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import config
from atom_jax.typing import AtomError

_COUNT = (1, 2**20)
# reward f32 [b, n, h], expected; end f32 or bool [b, n, h], the probability that the step ends the episode; and what
# it cost: numbers by name, of which those of several calls are added up.
Imagined = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Futures:
    """What a planner may ask about b rows.

    b: rows. actions: their number; continuous: actions are f32 [actions] in [-1, 1]. gamma: what a reward is worth
    a step later.
    fork: n -> a pytree [b, n, ...] of n futures of every row, in which nothing has happened yet.
    step: (futures [b, m, ...], parent i32 [b, n], action i32 [b, n] or f32 [b, n, actions]) -> (futures [b, n, ...],
      reward f32 [b, n], end [b, n], cost): future n goes on from `parent` with an action; reward, end and cost as in
      `Imagined`, of one step.
    imagine: actions i32 [b, n, h] (or f32 [b, n, h, actions]) -> Imagined; None: step after step.
    """

    b: int
    actions: int
    continuous: bool
    gamma: float
    fork: Callable[[int], Any]
    step: Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array, jax.Array, dict[str, jax.Array]]]
    imagine: Callable[[jax.Array], Imagined] | None = None

    def values(self, actions: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What sequences of actions i32 [b, n, h] (or f32 [b, n, h, actions]) promise, f32 [b, n], and the cost."""
        reward_bnh, end_bnh, cost = (self.imagine or self._step_by_step)(actions)
        return returns(reward_bnh, end_bnh, self.gamma), cost

    def _step_by_step(self, actions: jax.Array) -> Imagined:
        same = jnp.tile(jnp.arange(actions.shape[1])[None], (self.b, 1))

        def step(futures: Any, action: jax.Array) -> Any:
            futures, *made = self.step(futures, same, action)
            return futures, made

        made = jax.lax.scan(step, self.fork(actions.shape[1]), jnp.moveaxis(actions, 2, 0))[1]
        reward_hbn, end_hbn, cost = made
        return jnp.moveaxis(reward_hbn, 0, 2), jnp.moveaxis(end_hbn, 0, 2), _summed(cost)


@struct.dataclass
class Plan:
    """actions i32 [b, h] (or f32 [b, h, actions]); value f32 [b], the return that they promise; stats: futures and
    steps imagined per row, and the sums of what `Futures` says that they cost."""

    actions: jax.Array
    value: jax.Array
    stats: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Planner:
    """Base of all planners. name: as in "name:field=value"."""

    name: ClassVar[str] = ""
    ranges: ClassVar[dict[str, tuple[float, float | None]]] = {
        "n": _COUNT, "horizon": (1, 1024), "width": _COUNT, "elites": _COUNT, "iterations": (1, 1000),
        "alpha": (0, 1), "bound": (0, None), "every": (1, 1024),
    }  # fmt: skip

    def __post_init__(self):
        config.check(self, **self.ranges)

    @property
    def horizon(self) -> int:
        """Steps that are imagined; a field of most planners."""
        raise NotImplementedError

    @property
    def played(self) -> int:
        """How many actions of a plan are played before the next plan is made."""
        return self.horizon

    def plan(self, futures: Futures, key: jax.Array) -> Plan:
        """The most promising actions that it finds for every row; of equally promising ones the first."""
        raise NotImplementedError


@config.register
@dataclasses.dataclass(frozen=True)
class Shooting(Planner):
    """The best of n sequences of actions that are drawn uniformly, or from N(0, 1) clipped to [-1, 1]."""

    name: ClassVar[str] = "shooting"
    n: int = 64
    horizon: int = 6

    def plan(self, futures: Futures, key: jax.Array) -> Plan:
        """See `Planner.plan`."""
        law = _law(futures)
        actions = law.draw(jax.random.fold_in(key, 0), law.begin(self.horizon), self.n)
        value_bn, cost = futures.values(actions)
        chosen, value_b = _best(actions, value_bn)
        return Plan(chosen, value_b, cost | _imagined(self.n, self.horizon))


@config.register
@dataclasses.dataclass(frozen=True)
class Random(Planner):
    """One sequence of actions, drawn as by `Shooting`: what every planner has to beat."""

    name: ClassVar[str] = "random"
    horizon: int = 6

    def plan(self, futures: Futures, key: jax.Array) -> Plan:
        """See `Planner.plan`."""
        return Shooting(1, self.horizon).plan(futures, key)


@config.register
@dataclasses.dataclass(frozen=True)
class Cem(Planner):
    """The cross-entropy method: sequences are drawn from a law that moves to the best of them, step by step, from the
    law of `Shooting` on; the best ever seen is the plan.

    n sequences per iteration; law <- alpha law + (1 - alpha) law of the elites. For actions by number a law is their
    probabilities at each step, none under 0.02; else mean and standard deviation, at least 0.1, of each number.
    """

    name: ClassVar[str] = "cem"
    n: int = 64
    horizon: int = 6
    elites: int = 8
    iterations: int = 4
    alpha: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.elites > self.n:
            raise AtomError(f"elites: {self.elites} of n={self.n} sequences")

    def plan(self, futures: Futures, key: jax.Array) -> Plan:
        """See `Planner.plan`."""
        law = _law(futures)

        def iteration(carry: Any, i: jax.Array) -> Any:
            now, best, most_b = carry
            actions = law.draw(jax.random.fold_in(key, i), now, self.n)
            value_bn, cost = futures.values(actions)
            found, value_b = _best(actions, value_bn)
            better = value_b > most_b
            best = jnp.where(better.reshape(-1, *[1] * (best.ndim - 1)), found, best)
            elites = _rows(actions, jax.lax.top_k(value_bn, self.elites)[1])
            now = jax.tree.map(lambda a, e: self.alpha * a + (1 - self.alpha) * e, now, law.fit(elites))
            return (law.floored(now), best, jnp.where(better, value_b, most_b)), cost

        first = law.begin(self.horizon)
        none = jax.eval_shape(lambda: law.draw(key, first, 1)[:, 0])
        begin = first, jnp.zeros(none.shape, none.dtype), jnp.full((futures.b,), -jnp.inf)
        (_, best, value_b), cost = jax.lax.scan(iteration, begin, jnp.arange(self.iterations))
        return Plan(best, value_b, _summed(cost) | _imagined(self.n * self.iterations, self.horizon))


@config.register
@dataclasses.dataclass(frozen=True)
class Tree(Planner):
    """Beam search: of the beginnings of futures, `width` of which are kept, every action is tried, one step deeper
    each time. Those are kept that could still come to most: what they brought, and `bound`, the most that can follow,
    as if it came at the next step. Equals are kept by chance. For actions by number."""

    name: ClassVar[str] = "tree"
    width: int = 8
    horizon: int = 6
    bound: float = 1.0

    def plan(self, futures: Futures, key: jax.Array) -> Plan:
        """See `Planner.plan`."""
        if futures.continuous:
            raise AtomError("planner tree: it tries every action, and these are not numbered; take cem or shooting")
        b, a, w = futures.b, futures.actions, self.width
        parents = jnp.tile(jnp.arange(w).repeat(a)[None], (b, 1))
        action = jnp.tile(jnp.arange(a), w)[None].repeat(b, axis=0)

        def deeper(carry: Any, s: jax.Array) -> Any:
            """value, alive f32 [b, w]: what the beginnings brought, and the probability that they go on; kept i32
            [b, w]: which futures they are."""
            state, kept, value_bw, alive_bw, actions_bwh, _ = carry
            state, reward, end, cost = futures.step(state, _rows(kept, parents), action)
            weight = _rows(alive_bw, parents) * futures.gamma ** s.astype(jnp.float32)
            value = _rows(value_bw, parents) + weight * reward
            alive = _rows(alive_bw, parents) * (1 - end.astype(jnp.float32))
            actions = _rows(actions_bwh, parents).at[:, :, s].set(action)
            hope = value + alive * futures.gamma ** (s + 1).astype(jnp.float32) * self.bound
            # The best first, equals in a random order.
            order = jax.random.permutation(jax.random.fold_in(key, s), jnp.arange(w * a))
            kept = order[jax.lax.top_k(hope[:, order], w)[1]]
            return (state, kept, *(_rows(x, kept) for x in (value, alive, actions)), _best(actions, value)), cost

        only = jnp.where(jnp.arange(w) == 0, 0.0, -jnp.inf)[None].repeat(b, axis=0)
        begun = jnp.zeros((b, w, self.horizon), jnp.int32)
        kept, best = jnp.zeros((b, w), jnp.int32), (begun[:, 0], only[:, 0])
        begin = futures.fork(w * a), kept, only, jnp.ones((b, w)), begun, best
        (*_, (chosen, value_b)), cost = jax.lax.scan(deeper, begin, jnp.arange(self.horizon))
        return Plan(chosen, value_b, _summed(cost) | _imagined(w * a, self.horizon))


@config.register
@dataclasses.dataclass(frozen=True)
class Mpc(Planner):
    """Plans by another planner, and anew after `every` steps (or all that it plans, where they are fewer). On a
    command line `inner` comes last: "mpc:every=2,inner=cem:n=32,horizon=6"."""

    name: ClassVar[str] = "mpc"
    every: int = 1
    inner: Planner = dataclasses.field(default_factory=Shooting)

    @property
    def horizon(self) -> int:
        """See `Planner.horizon`."""
        return self.inner.horizon

    @property
    def played(self) -> int:
        """See `Planner.played`."""
        return min(self.every, self.horizon)

    def plan(self, futures: Futures, key: jax.Array) -> Plan:
        """See `Planner.plan`."""
        return self.inner.plan(futures, key)


PLANNERS: dict[str, type[Planner]] = {p.name: p for p in (Shooting, Cem, Tree, Mpc, Random)}


def parse(text: str | Planner) -> Planner:
    """The planner that a text such as "shooting:n=48,horizon=6" names. A planner is itself.

    Raises AtomError for an unknown name, an unknown field or an unreadable value.
    """
    if isinstance(text, Planner):
        return text
    text, inner = str(text).strip(), ""
    if text.startswith(f"{Mpc.name}:"):
        text, _, inner = text.partition("inner=")
    built = config.named(text, PLANNERS, "planner")
    return dataclasses.replace(built, inner=parse(inner)) if inner else built


def returns(reward_bnh: jax.Array, end_bnh: jax.Array, gamma: float) -> jax.Array:
    """f32 [b, n]: sum over s of gamma^s reward_s times the probability that no step before s ended the episode."""
    goes_on = jnp.cumprod(1 - end_bnh.astype(jnp.float32), axis=-1)
    alive = jnp.concatenate([jnp.ones_like(goes_on[..., :1]), goes_on[..., :-1]], axis=-1)
    weight = gamma ** jnp.arange(reward_bnh.shape[-1], dtype=jnp.float32)
    return (weight[None, None] * alive * reward_bnh).sum(-1)


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """Laws of sequences of actions by number: the probabilities f32 [b, h, a] at each step."""

    b: int
    actions: int

    def begin(self, h: int) -> jax.Array:
        return jnp.full((self.b, h, self.actions), 1 / self.actions)

    def draw(self, key: jax.Array, law: jax.Array, n: int) -> jax.Array:
        """i32 [b, n, h]."""
        return jax.random.categorical(key, jnp.log(law)[:, None], shape=(self.b, n, law.shape[1])).astype(jnp.int32)

    def fit(self, actions_bnh: jax.Array) -> jax.Array:
        return jax.nn.one_hot(actions_bnh, self.actions).mean(1)

    def floored(self, law: jax.Array) -> jax.Array:
        law = jnp.maximum(law, 0.02)
        return law / law.sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Laws of sequences of numbers: mean and standard deviation f32 [b, h, a] at each step."""

    b: int
    actions: int

    def begin(self, h: int) -> tuple[jax.Array, jax.Array]:
        zero = jnp.zeros((self.b, h, self.actions))
        return zero, zero + 1

    def draw(self, key: jax.Array, law: tuple[jax.Array, jax.Array], n: int) -> jax.Array:
        """f32 [b, n, h, a]."""
        mean, deviation = (x[:, None] for x in law)
        noise = jax.random.normal(key, (self.b, n, *mean.shape[2:]))
        return jnp.clip(mean + deviation * noise, -1, 1)

    def fit(self, actions_bnha: jax.Array) -> tuple[jax.Array, jax.Array]:
        return actions_bnha.mean(1), actions_bnha.std(1)

    def floored(self, law: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return law[0], jnp.maximum(law[1], 0.1)


def _law(futures: Futures) -> _Numbered | _Measured:
    return (_Measured if futures.continuous else _Numbered)(futures.b, futures.actions)


def _rows(x: jax.Array, index_bn: jax.Array) -> jax.Array:
    """x [b, m, ...] at index_bn i32 [b, n]: [b, n, ...]."""
    return jax.vmap(lambda row, index: row[index])(x, index_bn)


def _best(x: jax.Array, value_bn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of x [b, n, ...] that of the greatest value, the first of equals, [b, ...]; and that value, f32 [b]."""
    return _rows(x, value_bn.argmax(1)[:, None])[:, 0], value_bn.max(1)


def _summed(cost: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: x.sum(0), cost)


def _imagined(n: int, h: int) -> dict[str, jax.Array]:
    return {"futures": jnp.int32(n), "steps": jnp.int32(n * h)}
