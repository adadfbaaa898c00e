"""What an environment offers, and the episodes that it makes."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.typing import AtomError, Frames


@dataclasses.dataclass(frozen=True)
class Environment:
    """Base of all environments: frozen configurations, whose functions speak of one episode and go into `vmap`.

    A state is a pytree of arrays with at least `event`, bool: whether its frame holds something that the frames
    before don't tell. What chance decides comes from the keys alone.

    name: as in "name:field=value". continuous: actions are f32 [actions] in [-1, 1] instead of one of `actions`.
    palette: u8 [classes][3], the colours of classes in pictures. secrets: values of what the world hides, or 0.
    """

    name: ClassVar[str] = ""
    continuous: ClassVar[bool] = False
    palette: ClassVar[tuple[tuple[int, int, int], ...]] = ()
    secrets: ClassVar[int] = 0

    @property
    def actions(self) -> int:
        """Number of actions, or of the numbers that are one action."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a frame: the grid of its cells, or (height, width, channels)."""
        raise NotImplementedError

    @property
    def classes(self) -> int:
        """Number of classes of a cell (frames are u8), or 0 where frames are pixels, f32 in [0, 1]."""
        raise NotImplementedError

    @property
    def frames(self) -> int:
        """Frames of an episode, where nobody says."""
        raise NotImplementedError

    @property
    def watched(self) -> int:
        """Frames that are watched before one plans, where nobody says."""
        return self.frames

    def reset(self, key: jax.Array) -> tuple[Any, jax.Array]:
        """(state, frame 0)."""
        raise NotImplementedError

    def step(self, key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        """(state, frame, reward f32 [], done bool []) after an action, i32 [] (or f32 [actions]). `done` is true of
        the step that ends the episode; after it the frame stands still, and further steps give nothing."""
        raise NotImplementedError

    def behave(self, key: jax.Array, frames: int) -> jax.Array:
        """Actions i32 [frames] (or f32 [frames, actions]) of the policy that makes training data: uniform ones, each
        held with probability 0.4 per frame."""
        draw, hold = jax.random.split(key)
        if self.continuous:
            actions = jax.random.uniform(draw, (frames, self.actions), minval=-1.0)
        else:
            actions = jax.random.randint(draw, (frames,), 0, self.actions)
        fresh = jax.random.uniform(hold, (frames,)) >= 0.4
        return actions[jax.lax.cummax(jnp.where(fresh, jnp.arange(frames), 0))]

    def lasting(self, watch: int) -> Environment:
        """The same, made for `watch` frames that are watched before one may act. Raises AtomError for too few."""
        return self

    def reachable(self, state: Any, within: int) -> jax.Array | None:
        """bool []: whether some actions, so many or fewer, bring a reward from a state on; None where the world
        itself does not know."""
        return None

    def secret(self, state: Any) -> tuple[jax.Array, jax.Array]:
        """i32 [] each: what the world hides in a state, one of `secrets`, and the frame from which on it stays so."""
        return jnp.int32(0), jnp.int32(0)

    def render(self, obs: Any) -> np.ndarray:
        """A frame as a picture, u8 [height, width, 3]; cells are 8 pixels wide. Runs on the host."""
        if self.classes:
            cells = np.asarray(self.palette, np.uint8)[np.asarray(obs)]
            return cells.repeat(8, axis=0).repeat(8, axis=1)
        pixels = np.rint(np.clip(np.asarray(obs), 0, 1) * 255).astype(np.uint8)
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()


def episodes(env: Environment, key: jax.Array, n: int, frames: int) -> tuple[Frames, Any]:
    """n episodes of so many frames, their actions by `env.behave`; for compiled programs. Row i depends on the key
    and i alone.

    Also returns the states [n, ...] at the last frame, from which one can go on (`env.step`); the reward and the end
    at the last position are those of one step more.
    """

    def one(row: jax.Array) -> tuple[Frames, Any]:
        begin, act, chance = jax.random.split(row, 3)
        state, obs = env.reset(begin)
        actions = env.behave(act, frames)

        def step(carry: Any, now: Any) -> Any:
            state, obs, _ = carry
            t, action = now
            after, seen, reward, done = env.step(jax.random.fold_in(chance, t), state, action)
            return (after, seen, state), (obs, action, reward, done, state.event)

        (_, _, last), made = jax.lax.scan(step, (state, obs, state), (jnp.arange(frames), actions))
        positions = jnp.arange(frames, dtype=jnp.int32)
        return Frames(*made[:4], positions, jnp.ones_like(positions), made[4]), last

    return jax.vmap(lambda i: one(jax.random.fold_in(key, i)))(jnp.arange(n))


@struct.dataclass
class Followed:
    """What actions led to: obs [b, h, *shape], the frame after each of them; reward f32 [b, h]; done bool [b, h]; and
    the states [b, ...] at the end."""

    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    state: Any


def follow(env: Environment, key: jax.Array, state: Any, actions: jax.Array) -> Followed:
    """Plays actions i32 [b, h] (or f32 [b, h, actions]) from the states [b, ...] on; for compiled programs."""

    def one(i: jax.Array, state: Any, actions: jax.Array) -> Followed:
        row = jax.random.fold_in(key, i)

        def step(state: Any, now: Any) -> Any:
            state, obs, reward, done = env.step(jax.random.fold_in(row, now[0]), state, now[1])
            return state, (obs, reward, done)

        state, seen = jax.lax.scan(step, state, (jnp.arange(len(actions)), actions))
        return Followed(*seen, state)

    return jax.vmap(one)(jnp.arange(len(actions)), state, actions)


def check_actions(env: Environment, actions: Any, what: str = "actions") -> jax.Array:
    """Actions [..., horizon] of an environment (or [..., horizon, actions]) as an array of the right type.

    Raises AtomError, whose message begins with `what`, for actions that the environment does not have.
    """
    try:
        found = np.asarray(actions)
    except ValueError:
        raise AtomError(f"{what}: expected rows of equal length") from None
    if env.continuous:
        right = found.ndim > 1 and found.shape[-1] == env.actions and found.dtype.kind in "fiu"
        if not right or not np.all(np.abs(found) <= 1):
            raise AtomError(f"{what}: {env.name} takes {env.actions} numbers from -1 to 1 per step")
        return jnp.asarray(found, jnp.float32)
    if found.ndim < 1 or found.dtype.kind not in "iu" or not np.all((found >= 0) & (found < env.actions)):
        raise AtomError(f"{what}: {env.name} has actions 0 to {env.actions - 1}, whole numbers")
    return jnp.asarray(found, jnp.int32)
