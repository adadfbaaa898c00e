"""Plans at work: what they bring in an environment, and what one that knows the environment would have brought."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.data.envs import Environment, Followed, follow
from atom_jax.inference.planners import Futures, Plan, Planner


@struct.dataclass
class Played:
    """actions [b, h] (or [b, h, actions]), and what they led to: frames obs [b, h, *shape], reward f32 [b, h], done
    bool [b, h]. plans: all plans, one after another, each array [plans, ...]. state and mind: at the end."""

    actions: jax.Array
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    plans: Plan
    state: Any
    mind: Any


def simulator(env: Environment, state: Any, key: jax.Array, gamma: float = 0.95) -> Futures:
    """The futures that the environment itself has from the states [b, ...] on: the ceiling of every planner. What
    chance decides in them comes from `key`, so they don't foretell what it decides for others."""
    b = len(jax.tree.leaves(state)[0])

    def fork(n: int) -> Any:
        copies = jax.tree.map(lambda x: jnp.repeat(x[:, None], n, axis=1), state)
        return jnp.int32(0), copies

    def step(futures: Any, parent_bn: jax.Array, action: jax.Array) -> Any:
        t, states = futures
        states = jax.vmap(lambda row, index: jax.tree.map(lambda x: x[index], row))(states, parent_bn)
        keys = jax.random.split(jax.random.fold_in(key, t), parent_bn.shape)
        states, _, reward, done = jax.vmap(jax.vmap(env.step))(keys, states, action)
        return (t + 1, states), reward, done.astype(jnp.float32), {}

    return Futures(b, env.actions, env.continuous, gamma, fork, step)


def play(
    env: Environment,
    planner: Planner,
    key: jax.Array,
    state: Any,
    mind: Any,
    think: Callable[[Any, Any, jax.Array], Futures],
    notice: Callable[[Any, jax.Array, Followed], Any],
    steps: int | None = None,
) -> Played:
    """Plans and plays in turns; for compiled programs.

    Args:
      state: the environment's states [b, ...] to begin with; mind: a pytree, what is known about them.
      think: (mind, state, key) -> the futures that the planner asks; a model looks at mind alone, the `simulator` at
        the state.
      notice: (mind, actions [b, planner.played, ...], what they led to) -> mind.
      steps: to be played, a multiple of `planner.played`; by default its horizon, rounded up to one.
    """
    turns = -(-(steps or planner.horizon) // planner.played)

    def turn(carry: Any, key: jax.Array) -> Any:
        state, mind = carry
        drawn, guessed, chance = jax.random.split(key, 3)
        plan = planner.plan(think(mind, state, guessed), drawn)
        actions = plan.actions[:, : planner.played]
        led = follow(env, chance, state, actions)
        return (led.state, notice(mind, actions, led)), (actions, led.obs, led.reward, led.done, plan)

    (state, mind), (*made, plans) = jax.lax.scan(turn, (state, mind), jax.random.split(key, turns))
    rows = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])  # noqa: E731
    return Played(*map(rows, made), plans, state, mind)
