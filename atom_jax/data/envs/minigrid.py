"""Grids of the package xminigrid (the extra `envs`), such as MemoryS16: what lay in the first room?"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import config
from atom_jax.data.envs.environment import Environment
from atom_jax.typing import AtomError

# What the package calls a key.
_KEY = 7


@struct.dataclass
class State:
    """inner: the package's own; over and event bool. Only the first frame is known to be an event."""

    inner: Any
    over: jax.Array
    event: jax.Array


@config.register
@dataclasses.dataclass(frozen=True)
class Minigrid(Environment):
    """world: its name in the package. view: cells of a side that the agent sees, odd; it is in the middle of the
    nearest row. A cell is two classes, what is there and its colour. acts: how many of the actions 0 forward,
    1 right, 2 left, 3 pick up, 4 put down, 5 toggle there are; Memory needs the first three.

    The actions of `behave` are forward with probability `forward`, and else as everywhere. But by chance alone hardly
    anybody sees both ends of Memory's corridor: with `tour` they begin by turning round, going to the left end, where
    the object to be remembered lies, going to the right end, and looking left. That takes `touring` actions; then one
    of two objects is in sight, and the agent should step towards the one that is like the first.

    The reward is the package's, 1 - 0.9 frames / most frames where the goal is reached. Unlike there, the world
    stands still after the end.
    """

    world: str = "MiniGrid-MemoryS16"
    view: int = 3
    acts: int = 3
    forward: float = 0.6
    tour: bool = True

    name: ClassVar[str] = "minigrid"
    classes: ClassVar[int] = 13

    def __post_init__(self):
        config.check(self, view=(3, 31), acts=(1, 6), forward=(0, 1))
        if self.view % 2 == 0:
            raise AtomError(f"view: expected an odd number of cells, got {self.view}")
        # Not later: what the package makes when it is imported must not be part of a program that is being traced.
        _made(self.world, self.view)

    @property
    def actions(self) -> int:
        """See `Environment.actions`."""
        return self.acts

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Environment.shape`."""
        return self.view, self.view, 2

    @property
    def touring(self) -> int:
        """Actions of the tour, 0 without one."""
        return len(self._tour())

    @property
    def frames(self) -> int:
        """The tour, and nine actions."""
        return self.touring + 10 if self.tour else 64

    @property
    def watched(self) -> int:
        """The tour, after which one has to decide."""
        return self.touring or self.frames

    def reset(self, key: jax.Array) -> tuple[State, jax.Array]:
        """See `Environment.reset`."""
        env, params = _made(self.world, self.view)
        inner = env.reset(params, key)
        no = jnp.zeros((), bool)
        return State(inner, no, ~no), inner.observation

    def step(self, key: jax.Array, state: State, action: jax.Array) -> tuple[State, jax.Array, jax.Array, jax.Array]:
        """See `Environment.step`. Chance has no part in it."""
        env, params = _made(self.world, self.view)
        inner = env.step(params, state.inner, action)
        inner = jax.tree.map(lambda old, new: jnp.where(state.over, old, new), state.inner, inner)
        done = inner.last() & ~state.over
        reward = jnp.where(done, inner.reward, 0.0)
        return State(inner, state.over | done, jnp.zeros((), bool)), inner.observation, reward, done

    def behave(self, key: jax.Array, frames: int) -> jax.Array:
        """See `Environment.behave`, and above."""
        ahead, others = jax.random.split(key)
        drawn = super().behave(others, frames)
        drawn = jnp.where(jax.random.uniform(ahead, (frames,)) < self.forward, 0, drawn)
        return jnp.concatenate([jnp.array(self._tour(), drawn.dtype), drawn])[:frames]

    @property
    def secrets(self) -> int:
        """See `Environment.secrets`."""
        return 2 if "Memory" in self.world else 0

    def secret(self, state: State) -> tuple[jax.Array, jax.Array]:
        """Of Memory, whether the object in the first room is a key, and the frame at which the tour is there."""
        if not self.secrets:
            return super().secret(state)
        at_left = self.touring // 2
        return (state.inner.state.grid[2, 1, 0] == _KEY).astype(jnp.int32), jnp.int32(at_left)

    def _tour(self) -> list[int]:
        """Where the agent is does not matter: it goes until it meets a wall."""
        long = _made(self.world, self.view)[1].width - 3
        return [1, 1, *[0] * long, 1, 1, *[0] * long, 2] if self.tour else []

    def render(self, obs: Any) -> np.ndarray:
        """See `Environment.render`: what the agent sees from where it is, below in the middle, looking up."""
        from xminigrid.rendering.rgb_render import render_tile

        cells, v = np.asarray(obs).tolist(), self.view
        agent = v - 1, v // 2
        tile = lambda r, c: render_tile(tuple(cells[r][c]), 0 if (r, c) == agent else None, tile_size=16)  # noqa: E731
        picture = np.concatenate([np.concatenate([tile(r, c) for c in range(v)], 1) for r in range(v)], 0)
        return np.rint(picture).astype(np.uint8)


@functools.lru_cache
def _made(world: str, view: int) -> tuple[Any, Any]:
    try:
        import xminigrid
    except ImportError:
        raise AtomError("env minigrid: the package xminigrid is missing: pip install 'atom-jax[envs]'") from None
    known = xminigrid.registered_environments()
    if world not in known:
        raise AtomError(f"world {world!r}: xminigrid has {', '.join(n for n in known if n.startswith('Mini'))}")
    return xminigrid.make(world, view_size=view)
