"""A world to watch before one may act in it: where was the last flash, and how does one get there?

A small grid has a pad at the middle of every side, some walls, an agent in the middle, and a clock in the corner. For
a while (the watch) the agent cannot move; the clock alternates every frame, and now and then a pad lights for one
frame: the treasure is there now. Then the clock shows `go`, and the agent moves. The first pad that it steps on ends
the episode, with reward 1 if the treasure is there. So nearly every frame can be foretold, and the few that cannot
are all that has to be remembered.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import config
from atom_jax.data.envs.environment import Environment
from atom_jax.typing import AtomError

FLOOR, WALL, AGENT, PAD, LIT, CLOCK, GO = 0, 1, 2, 3, 4, 5, 7  # the clock alternates between 5 and 6
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left
_FIRST = 8  # the first flash is at a frame from 1 to this one
_LEAST = 3  # frames of a watch


@struct.dataclass
class State:
    """walls bool [s, s]; agent i32 [2], row and column; go i32, the first frame at which the agent moves; first i32,
    the frame of the first flash; t i32, the frame; treasure i32, its pad or -1; lit i32, the pad that is lit or -1;
    over and event bool."""

    walls: jax.Array
    agent: jax.Array
    go: jax.Array
    first: jax.Array
    t: jax.Array
    treasure: jax.Array
    lit: jax.Array
    over: jax.Array
    event: jax.Array


@struct.dataclass
class Way:
    """steps: i32, how many it takes to the treasure, or -1 where there is no way; actions: i32 [within], the first
    `steps` of them are a shortest way, the rest 0."""

    steps: jax.Array
    actions: jax.Array


@config.register
@dataclasses.dataclass(frozen=True)
class Watch(Environment):
    """size: cells of a side, odd. least, most: the watch lasts so many frames, each number as often. flash: the
    probability of a flash per frame after the first one, which comes at frame 1 to 8, but before the last two frames
    of the watch. reveal: once the agent has stepped on a pad, the treasure's pad is lit.

    Walls: of the four cells next to the middle each with probability 0.3, of two cells diagonally between the clock
    and the opposite corner with 0.2. Actions 0 up, 1 right, 2 down, 3 left; during the watch they do nothing.
    """

    size: int = 5
    least: int = 32
    most: int = 48
    flash: float = 1 / 16
    reveal: bool = True

    name: ClassVar[str] = "watch"
    actions: ClassVar[int] = 4
    watched: ClassVar[int] = 40
    secrets: ClassVar[int] = 4
    classes: ClassVar[int] = 8
    palette: ClassVar[tuple[tuple[int, int, int], ...]] = (
        (245, 245, 240), (70, 70, 80), (40, 110, 200), (200, 190, 170), (250, 190, 30), (150, 200, 150),
        (200, 150, 190), (40, 170, 80),
    )  # fmt: skip

    def __post_init__(self):
        watch = (_LEAST, 2**20)
        config.check(self, size=(5, 31), least=watch, most=watch, flash=(0, 1))
        if self.size % 2 == 0:
            raise AtomError(f"size: expected an odd number of cells, got {self.size}")
        if self.least > self.most:
            raise AtomError(f"least: a watch of at least {self.least} frames, but at most {self.most}")

    @property
    def shape(self) -> tuple[int, int]:
        """See `Environment.shape`."""
        return self.size, self.size

    @property
    def frames(self) -> int:
        """The longest watch, and five steps."""
        return self.most + 6

    def lasting(self, watch: int) -> Watch:
        """The same with a watch of exactly so many frames, in which on average as many flashes come as in one of
        (least + most) / 2 (as far as the probability of a flash can be raised). `watch` + 1 frames of it end with
        the one at which the agent may move. Raises AtomError for less than 3 frames."""
        if watch < _LEAST:
            raise AtomError(f"length={watch}: a watch lasts at least {_LEAST} frames")
        rooms = [max(w - 2 - (1 + min(_FIRST, w - 2)) / 2, 0) for w in ((self.least + self.most) / 2, watch)]
        flash = min(1.0, self.flash * rooms[0] / rooms[1]) if rooms[1] else self.flash
        return dataclasses.replace(self, least=watch, most=watch, flash=flash)

    def pads(self) -> jax.Array:
        """i32 [4, 2]: row and column of the pads, in the order top, right, bottom, left."""
        c, e = self.size // 2, self.size - 1
        return jnp.array([(0, c), (c, e), (e, c), (c, 0)], jnp.int32)

    def layout(self, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What chance decides about an episode: walls bool [s, s], the frame of `go`, that of the first flash."""
        at, watch, first = jax.random.split(key, 3)
        c, e = self.size // 2, self.size - 2
        cells = jnp.array([(c - 1, c), (c, c + 1), (c + 1, c), (c, c - 1), (1, 1), (e, e)])
        there = jax.random.uniform(at, (6,)) < jnp.array([0.3] * 4 + [0.2] * 2)
        walls = jnp.zeros(self.shape, bool).at[cells[:, 0], cells[:, 1]].set(there)
        go = jax.random.randint(watch, (), self.least, self.most + 1)
        return walls, go, jax.random.randint(first, (), 1, jnp.minimum(_FIRST, go - 2) + 1)

    def chance(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What chance decides about a frame: whether there may be a flash again, and on which pad."""
        again, pad = jax.random.split(key)
        return jax.random.uniform(again, ()) < self.flash, jax.random.randint(pad, (), 0, 4)

    def reset(self, key: jax.Array) -> tuple[State, jax.Array]:
        """See `Environment.reset`."""
        walls, go, first = self.layout(key)
        middle = jnp.full((2,), self.size // 2, jnp.int32)
        none, no = jnp.int32(-1), jnp.zeros((), bool)
        state = State(walls, middle, go, first, jnp.int32(0), none, none, no, ~no)
        return state, self._seen(state)

    def step(self, key: jax.Array, state: State, action: jax.Array) -> tuple[State, jax.Array, jax.Array, jax.Array]:
        """See `Environment.step`."""
        again, pad = self.chance(key)
        t = state.t + 1
        flash = (t == state.first) | (again & (t > state.first) & (t < state.go - 1))
        to = state.agent + jnp.array(_MOVES, jnp.int32)[action]
        moves = (state.t >= state.go) & ~state.over & self._free(state.walls, to)
        agent = jnp.where(moves, to, state.agent)
        on = (self.pads() == agent[None]).all(-1)
        done = moves & on.any()
        over = state.over | done
        treasure = jnp.where(flash, pad, state.treasure)
        shown = jnp.where(over & self.reveal, treasure, -1)
        event = flash | (t == state.go) | (done & self.reveal)
        state = State(
            state.walls, agent, state.go, state.first, t, treasure, jnp.where(flash, pad, shown), over, event
        )
        return state, self._seen(state), (done & on[treasure]).astype(jnp.float32), done

    def secret(self, state: State) -> tuple[jax.Array, jax.Array]:
        """The treasure's pad, and the frame of `go`."""
        return state.treasure, state.go

    def reachable(self, state: State, within: int) -> jax.Array:
        """Whether there is a `way`."""
        return self.way(state, within).steps >= 0

    def way(self, state: State, within: int = 6) -> Way:
        """The oracle: a shortest way from the agent to the treasure that steps on no other pad."""
        pads, s = self.pads(), self.size
        target = pads[state.treasure]
        closed = state.walls.at[0, 0].set(True).at[pads[:, 0], pads[:, 1]].set(True)
        far = jnp.int32(within + 1)
        steps = jnp.full((s + 2, s + 2), far).at[target[0] + 1, target[1] + 1].set(0)

        def nearer(_: int, steps: jax.Array) -> jax.Array:
            around = [steps[1 + r : 1 + r + s, 1 + c : 1 + c + s] for r, c in _MOVES]
            best = jnp.minimum(jnp.stack(around).min(0) + 1, steps[1:-1, 1:-1])
            return steps.at[1:-1, 1:-1].set(jnp.where(closed, steps[1:-1, 1:-1], jnp.minimum(best, far)))

        steps = jax.lax.fori_loop(0, within, nearer, steps)
        moves = jnp.array(_MOVES, jnp.int32)

        def walk(at: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            around = at[None] + moves
            action = jnp.argmin(steps[around[:, 0] + 1, around[:, 1] + 1]).astype(jnp.int32)
            there = steps[at[0] + 1, at[1] + 1] == 0
            return jnp.where(there, at, around[action]), jnp.where(there, 0, action)

        found = steps[state.agent[0] + 1, state.agent[1] + 1]
        found = jnp.where((found < far) & (state.treasure >= 0) & ~state.over, found, -1)
        _, actions = jax.lax.scan(walk, state.agent, None, length=within)
        return Way(found, jnp.where(jnp.arange(within) < found, actions, 0))

    def _free(self, walls: jax.Array, cell: jax.Array) -> jax.Array:
        """Whether the agent can be in a cell, i32 [2]: inside, no wall, not the clock."""
        inside = ((cell >= 0) & (cell < self.size)).all()
        return inside & (cell != 0).any() & ~walls[cell[0], cell[1]]

    def _seen(self, state: State) -> jax.Array:
        """The frame, u8 [s, s]."""
        pads = self.pads()
        cells = jnp.where(state.walls, WALL, FLOOR).astype(jnp.uint8)
        cells = cells.at[pads[:, 0], pads[:, 1]].set(PAD).at[state.agent[0], state.agent[1]].set(AGENT)
        lit = pads[state.lit]
        cells = cells.at[lit[0], lit[1]].set(jnp.where(state.lit >= 0, LIT, cells[lit[0], lit[1]]))
        return cells.at[0, 0].set(jnp.where(state.t < state.go, CLOCK + state.t % 2, GO).astype(jnp.uint8))
