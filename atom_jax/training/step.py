"""One training step as a pure function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from atom_jax.params import Tree
from atom_jax.training.losses import Sums, summary
from atom_jax.training.objectives.base import Objective, Setting
from atom_jax.training.optim import Optimizer, merge
from atom_jax.training.state import State

Metrics = dict[str, jax.Array]


def make_step(
    objective: Objective, setting: Setting, optimizer: Optimizer, places: Tree
) -> Callable[[State, Any], tuple[State, Metrics]]:
    """The function (state, batch) -> (state, metrics), to be jitted with the state donated.

    places: shardings of the parameters, which their gradients get too.
    The gradient is that of the mean over all targets of the batch, however it is cut into `optim.accumulate` parts
    (with the exceptions named there). Noise depends on the step, so a resumed run draws the same. A step whose loss
    or gradient is not finite leaves everything but the counters as it was.
    """
    exp = setting.exp
    parts, ema = exp.optim.accumulate, exp.optim.ema

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        learn, frozen = optimizer.split(state.params)
        # Known before the forward pass, so every part is divided by the number of targets in the whole batch.
        scale = 1.0 / jnp.maximum(jnp.sum(batch.loss_mask > 0, dtype=jnp.float32), 1.0)
        counts = objective.counts(batch, setting)

        def loss(learn: Tree, part: Any, number: jax.Array) -> tuple[jax.Array, Sums]:
            key = jax.random.fold_in(jax.random.key(exp.seed), state.step * parts + number)
            sums = objective.loss(merge(learn, frozen), part, key, state.step, setting=setting, counts=counts)
            return sums.objective * scale, sums

        grads, sums = _gradient(loss, learn, batch, parts, optimizer.split(places)[0])
        norm = optax.global_norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(sums.objective)
        new, opt = optimizer.update(grads, state.opt, learn, state.step)
        average = state.ema
        if average is not None:
            # Early on the average follows quickly, or it would be made of initial values for 1 / (1 - ema) steps.
            decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
            average = jax.tree.map(lambda a, p: a + (1.0 - decay).astype(a.dtype) * (p - a), average, new)
        keep = lambda a, b: jnp.where(good, a, b)  # noqa: E731
        new, opt, average = jax.tree.map(keep, (new, opt, average), (learn, state.opt, state.ema))
        bad = jnp.where(good, 0, state.bad + 1)
        metrics = (
            summary(sums)
            | {
                "grad_norm": norm,
                "learning_rate": optimizer.schedule(state.step),
                "tokens": sums.tokens,
                "bad": bad,
            }
            | ({} if sums.bytes is None else {"bytes": sums.bytes})
        )
        return State(state.step + 1, merge(new, frozen), opt, average, bad), metrics

    return step


def _gradient(loss: Callable, learn: Tree, batch: Any, parts: int, places: Tree) -> tuple[Tree, Sums]:
    def gradient(*args: Any) -> tuple[Tree, Sums]:
        grads, sums = jax.grad(loss, has_aux=True)(*args)
        return jax.lax.with_sharding_constraint(grads, places), sums

    if parts == 1:
        return gradient(learn, batch, jnp.int32(0))
    # Part i takes rows i, i + parts, ...: every device finds rows of every part among its own.
    cut = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731

    def add(total: Any, inputs: tuple[Any, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(learn, *inputs)), None

    pieces = jax.tree.map(cut, batch)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(gradient, learn, jax.tree.map(lambda x: x[0], pieces), jnp.int32(0)),
    )
    return jax.lax.scan(add, zeros, (pieces, jnp.arange(parts)))[0]
