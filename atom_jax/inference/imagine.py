"""World models at work: watching an episode, imagining futures, planning.

    state = atom_jax.observe(world, episode)
    out = atom_jax.imagine(world, state, actions)
    plan = atom_jax.plan(world, state, "shooting:n=48,horizon=6", key)

A state knows all frames; the latest of them is still to be read, with the action that is taken at it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.data.envs import Environment
from atom_jax.inference import planners
from atom_jax.inference.planners import Futures, Plan, Planner
from atom_jax.kvcache import branch, memory
from atom_jax.kvcache.memory import Memory
from atom_jax.kvcache.policy import Policy, policies_of
from atom_jax.models import registry, world
from atom_jax.models.hnet import ports
from atom_jax.models.world import WorldConfig
from atom_jax.params import Tree
from atom_jax.session import reading
from atom_jax.typing import LM, AtomError, Frames


@struct.dataclass
class WorldState:
    """What is known of b episodes.

    cache: the model's memory of all frames but the latest, with their actions. obs: the latest frames [b, ...] as the
    model reads them (`encode` of its port: mostly [b, *grid] as they are).
    length: i32 [b], frames seen, the latest among them. units: i32 [b], units of the frames that were read: as often
    the main network has run.
    """

    cache: Memory
    obs: jax.Array
    length: jax.Array
    units: jax.Array


@struct.dataclass
class Imagined:
    """What n futures of b episodes hold, in the order of their steps.

    frames: [b, n, h, *grid] after each action. reward: f32 [b, n, h], expected; done: f32 [b, n, h], the probability
    that the step ends the episode. units: bool [b, n, h], steps at which a unit began or ended; that of the first is
    of a real frame, the latest that was seen. stats: main_steps, units of all futures, and main_calls, steps at which
    the main network ran for any of them, i32 [].
    """

    frames: jax.Array
    reward: jax.Array
    done: jax.Array
    units: jax.Array
    stats: dict[str, jax.Array]


def observe(lm: LM, episode: Frames, state: WorldState | None = None) -> WorldState:
    """What is known after an episode's frames [b, t, *grid], padding (segment 0) last; of its actions, those at all
    frames but the latest count. With a `state`, the episode goes on: its first frame is the latest that was seen.

    Raises AtomError for frames and actions that are not of the model's world.
    """
    cfg = checked(lm, None, "observe")
    b, t = _check_frames(episode, cfg)
    episode = jax.tree.map(jnp.asarray, episode)
    episode = episode.replace(obs=_encode(lm.params, episode.obs, cfg))
    if state is None:
        nothing = jnp.zeros(b, jnp.int32)
        state = WorldState(_empty(cfg, b, t + 8), episode.obs[:, 0], nothing, nothing)
    elif len(state.obs) != b:
        raise AtomError(f"episode: it has {b} rows, and the state {len(state.obs)}")
    part = memory.part(state.cache) or t
    for begin in range(0, t, part):
        # Parts have a frame in common, which is read in the second of them.
        cut = jax.tree.map(lambda x, begin=begin: x[:, begin : begin + part + 1], episode)
        if begin and cut.obs.shape[1] < 2:
            break
        state = _whole(lm.params, state, cut, cfg, t + 8)
    return state


def _whole(p: Tree, state: WorldState, episode: Frames, cfg: WorldConfig, capacity: int) -> WorldState:
    """What is known after an episode, as the model reads it, whose units are all there: where there were more than
    the model has room for, they are read again with more room. capacity: frames that an empty memory is made for,
    which cache policies need no slots for; they do in one that goes on."""
    b, t = episode.obs.shape[:2]
    begins = state.cache.fresh
    cache = _empty(cfg, b, capacity) if begins else reading.room(state.cache, t, cfg)
    found, lost = _observe(p, state.replace(cache=cache), episode, cfg)
    if (wider := registry.of(cfg).roomier(cfg)) is not None and np.any(lost):
        return _whole(p, state, episode, wider, capacity)
    return found


def imagine(lm: LM, state: WorldState, actions: Any, key: jax.Array | None = None, frames: Any = None) -> Imagined:
    """What actions i32 [b, n, h] would lead to: n futures of each row of the state.

    key: frames are drawn as the model has them; None: the likeliest class of each cell. frames: [b, n, h, *grid], to
    be taken for what comes after each action, in place of what is imagined.
    Raises AtomError for actions and frames that are not of the model's world.
    """
    cfg = checked(lm, None, "imagine")
    actions = _check_actions(actions, cfg, len(state.obs))
    if frames is not None:
        _check_classes(frames, (*actions.shape, *cfg.port.grid), cfg, "frames")
        frames = jnp.asarray(frames)
    state = state.replace(cache=memory.fit(state.cache, actions.shape[2]))
    return _imagine(lm.params, state, actions, key, frames, cfg)


def plan(lm: LM, state: WorldState, planner: str | Planner, key: jax.Array | None = None) -> Plan:
    """The most promising actions i32 [b, h], what they promise, and what it took to find them: futures and steps per
    row, and main_steps of the latest frame, which is real, and main_steps_imagined of all others, over all rows.

    Raises AtomError for a planner that is unknown.
    """
    cfg, planner = checked(lm, None, "plan"), planners.parse(planner)
    state = state.replace(cache=memory.fit(state.cache, planner.horizon))
    return _plan(lm.params, state, jax.random.key(0) if key is None else key, planner, cfg)


def futures(p: Tree, state: WorldState, horizon: int, cfg: WorldConfig, key: jax.Array | None = None) -> Futures:
    """What a planner may ask about a state with room for its horizon; for compiled programs."""
    b = len(state.obs)

    def fork(n: int) -> Any:
        return jnp.int32(0), forked(state, n, horizon)

    def step(now: Any, parent_bn: jax.Array, action_bn: jax.Array) -> Any:
        at, state = now
        flat = jnp.arange(b)[:, None] * (len(state.obs) // b) + parent_bn
        state, made = advance(p, taken(state, flat.ravel()), action_bn.ravel(), _folded(key, at), cfg)
        reward, end = (made[name].reshape(parent_bn.shape) for name in ("reward", "done"))
        return (at + 1, state), reward, end, _cost(jnp.sum(made["units"]), at == 0)

    def values(actions_bnh: jax.Array) -> planners.Imagined:
        made = rollout(p, state, actions_bnh, key, None, cfg)
        first, rest = jnp.sum(made.units[..., 0]), jnp.sum(made.units[..., 1:])
        return made.reward, made.done, {"main_steps": first, "main_steps_imagined": rest}

    return Futures(b, cfg.port.actions, False, cfg.gamma, fork, step, values)


def rollout(
    p: Tree, state: WorldState, actions_bnh: jax.Array, key: jax.Array | None, frames: Any, cfg: WorldConfig
) -> Imagined:
    """As `imagine`, of a state with room for the steps; for compiled programs."""
    (b, n, h), port = actions_bnh.shape, ports.of(cfg)
    state, given = forked(state, n, h), None
    if frames is not None:
        given = jnp.moveaxis(port.encode(p, frames.reshape(b * n, h, *frames.shape[3:]), cfg), 1, 0)

    def step(state: WorldState, now: Any) -> Any:
        at, action, seen = now
        state, made = advance(p, state, action, _folded(key, at), cfg, seen)
        return state, made | {"obs": state.obs}

    acts = jnp.moveaxis(actions_bnh.reshape(b * n, h), 1, 0)
    _, made = jax.lax.scan(step, state, (jnp.arange(h), acts, given))
    ran = jnp.sum(jnp.any(made["units"], axis=1), dtype=jnp.int32)
    made = {name: jnp.moveaxis(x, 0, 1) for name, x in made.items()}
    made |= {"obs": port.decode(p, made["obs"], cfg)}
    made = {name: x.reshape(b, n, h, *x.shape[2:]) for name, x in made.items()}
    stats = {"main_steps": jnp.sum(made["units"], dtype=jnp.int32), "main_calls": ran}
    return Imagined(made["obs"], made["reward"], made["done"], made["units"], stats)


def advance(
    p: Tree, state: WorldState, action_b: jax.Array, key: jax.Array | None, cfg: WorldConfig, seen: Any = None
) -> tuple[WorldState, dict[str, jax.Array]]:
    """The state after an action at the latest frame of every row, whose next frame is imagined, or, where it is
    given, `seen` [b, ...]; and the reward, done and units [b] of the step (`Imagined`). The main network runs where
    any row has a unit."""
    b = len(action_b)
    nothing = jnp.zeros((b, 1))
    frames = Frames(
        state.obs[:, None], action_b[:, None], nothing, nothing > 0, state.cache.length[:, None],
        jnp.ones((b, 1), jnp.int32),
    )  # fmt: skip
    x_b1e, cache, aux = world.hidden(p, frames, cfg=cfg, cache=state.cache)
    found = world.outputs(p, x_b1e, cfg=cfg)
    reward, done = (x[:, 0] for x in world.expected(found))
    unit = aux["boundaries"][0][:, 0]
    obs = ports.of(cfg).sample(found.frame, key, cfg)[:, 0] if seen is None else seen
    after = WorldState(cache, obs.astype(state.obs.dtype), state.length + 1, state.units + unit)
    return after, {"reward": reward, "done": done, "units": unit}


def read(p: Tree, state: WorldState, episode: Frames, cfg: WorldConfig) -> tuple[WorldState, jax.Array]:
    """As `observe`, of a state with room for the frames, as the model reads them, for compiled programs; and how
    many units there was no room for, i32 []."""
    t = episode.obs.shape[1]
    count = jnp.sum(episode.segments > 0, axis=1, dtype=jnp.int32)
    index = jnp.arange(t, dtype=jnp.int32)[None]
    segments = (index < count[:, None] - 1).astype(jnp.int32)
    frames = episode.replace(positions=state.cache.length[:, None] + index, segments=segments, marks=None)
    _, cache, aux = world.hidden(p, frames, cfg=cfg, cache=state.cache)
    at = jnp.maximum(count - 1, 0).reshape(-1, *[1] * (episode.obs.ndim - 1))
    obs = jnp.take_along_axis(episode.obs, at, axis=1)[:, 0]
    # Rows that end before these frames keep what they saw last.
    obs = jnp.where((count > 0).reshape(-1, *[1] * (obs.ndim - 1)), obs, state.obs)
    units = state.units + jnp.sum(aux["boundaries"][0], axis=1, dtype=jnp.int32)
    return settled(WorldState(cache, obs, cache.length + 1, units)), aux["lost"]


def forked(state: WorldState, n: int, room: int) -> WorldState:
    """n futures of every row, one beside the other, with room for so many frames each. They share what full-attention
    layers hold; everything else is copied, and small in a state that fits (`memory.fit`)."""
    others = (jnp.repeat(x, n, axis=0) for x in (state.obs, state.length, state.units))
    return settled(WorldState(branch.fork(state.cache, n, room), *others))


def taken(state: WorldState, index: jax.Array) -> WorldState:
    """The rows `index` i32 [n], some perhaps repeatedly."""
    others = (jnp.take(x, index, axis=0) for x in (state.obs, state.length, state.units))
    return settled(WorldState(memory.rows(state.cache, index), *others))


def settled(state: WorldState) -> WorldState:
    """The state as one in which something is known, whether it is or not: loops carry one kind."""
    return state.replace(cache=memory.each(lambda node: node.replace(fresh=False), state.cache))


def after(p: Tree, state: WorldState, actions: jax.Array, obs: jax.Array, cfg: WorldConfig) -> Frames:
    """The episode, for `read`, that goes on from a state with actions [b, h], and the frames [b, h, *grid] that these
    led to."""
    (b, h), obs = actions.shape[:2], ports.of(cfg).encode(p, obs, cfg)
    obs = jnp.concatenate([state.obs[:, None], obs.astype(state.obs.dtype)], axis=1)
    action = jnp.concatenate([actions, actions[:, :1]], axis=1)
    index, nothing = jnp.tile(jnp.arange(h + 1, dtype=jnp.int32)[None], (b, 1)), jnp.zeros((b, h + 1))
    return Frames(obs, action, nothing, nothing > 0, index, jnp.ones_like(index))


def roomy(cfg: WorldConfig) -> WorldConfig:
    """The same model with room for a unit at every frame, for programs that cannot read anything again."""
    return dataclasses.replace(cfg, chunking=tuple(dataclasses.replace(c, capacity=1.0) for c in cfg.chunking))


def checked(lm: LM, env: Environment | None, what: str) -> WorldConfig:
    """The configuration of a model. Raises AtomError for one of texts, of another world than `env`, and with a cache
    policy that chooses once a prompt is read."""
    if not isinstance(lm, LM):
        raise AtomError(f"{what}: expected a model, as atom_jax.load gives it, got {lm!r:.80}")
    if not isinstance(lm.config, WorldConfig):
        raise AtomError(f"{what}: it takes a world model, and this one is of the family {lm.family}")
    port = lm.config.port
    if env is not None and (env.shape, env.classes, env.actions) != (port.grid, port.classes, port.actions):
        theirs = f"frames of {list(env.shape)}, {env.classes} classes and {env.actions} actions"
        raise AtomError(f"env {env.name}: it has {theirs}, and the model {ports.of(lm.config).describe(lm.config)}")
    for policy in policies_of(registry.of(lm.config).memory(lm.config)):
        if type(policy).settle is not Policy.settle:
            raise AtomError(f"memory: {policy.name} chooses once a prompt is read, and an episode goes on and on")
    return lm.config


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(cfg: WorldConfig, b: int, frames: int) -> Memory:
    return registry.of(cfg).init_cache(cfg, b, frames)


@functools.partial(jax.jit, static_argnames="cfg")
def _encode(p: Tree, obs: jax.Array, cfg: WorldConfig) -> jax.Array:
    return ports.of(cfg).encode(p, obs, cfg)


@functools.partial(jax.jit, static_argnames="cfg")
def _observe(p: Tree, state: WorldState, episode: Frames, cfg: WorldConfig) -> tuple[WorldState, jax.Array]:
    return read(p, state, episode, cfg)


@functools.partial(jax.jit, static_argnames="cfg")
def _imagine(
    p: Tree, state: WorldState, actions: jax.Array, key: jax.Array | None, frames: Any, cfg: WorldConfig
) -> Imagined:
    return rollout(p, state, actions, key, frames, cfg)


@functools.partial(jax.jit, static_argnames=("planner", "cfg"))
def _plan(p: Tree, state: WorldState, key: jax.Array, planner: Planner, cfg: WorldConfig) -> Plan:
    return planner.plan(futures(p, state, planner.horizon, cfg), key)


def _folded(key: jax.Array | None, at: jax.Array) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, at)


def _cost(units: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
    return {"main_steps": jnp.where(real, units, 0), "main_steps_imagined": jnp.where(real, 0, units)}


def _check_frames(episode: Frames, cfg: WorldConfig) -> tuple[int, int]:
    """Rows and frames."""
    if not isinstance(episode, Frames):
        raise AtomError(f"episode: expected atom_jax.Frames, got {episode!r:.80}")
    b, t = (*np.shape(episode.obs), 0, 0)[:2]
    _check_classes(episode.obs, (b, t, *cfg.port.grid), cfg, "episode")
    _check_numbers(episode.action, (b, t), cfg, "episode")
    if np.shape(episode.segments) != (b, t):
        raise AtomError(f"episode: expected segments [{b}, {t}], got {list(np.shape(episode.segments))}")
    return b, t


def _check_classes(obs: Any, shape: tuple[int, ...], cfg: WorldConfig, what: str) -> None:
    found = np.asarray(obs)
    if found.shape != shape or 0 in shape:
        grid = ", ".join(map(str, cfg.port.grid))
        raise AtomError(f"{what}: expected frames [..., {grid}] of at least one row, got {list(found.shape)}")
    if not cfg.port.classes:
        if found.dtype != np.float32 or not (found.min() >= 0 and found.max() <= 1):
            raise AtomError(f"{what}: frames hold numbers from 0 to 1, as float32")
    elif found.dtype != np.uint8 or found.max() >= cfg.port.classes:
        raise AtomError(f"{what}: frames hold classes below {cfg.port.classes}, as uint8")


def _check_actions(actions: Any, cfg: WorldConfig, b: int) -> jax.Array:
    try:
        found = np.asarray(actions)
    except ValueError:
        raise AtomError("actions: expected futures of equal length") from None
    if found.ndim != 3 or found.shape[0] != b or 0 in found.shape:
        raise AtomError(f"actions: expected [{b}, futures, steps], got {list(found.shape)}")
    _check_numbers(found, found.shape, cfg, "actions")
    return jnp.asarray(found, jnp.int32)


def _check_numbers(actions: Any, shape: tuple[int, ...], cfg: WorldConfig, what: str) -> None:
    found, most = np.asarray(actions), cfg.port.actions
    if found.shape != shape or found.dtype.kind not in "iu" or not ((found >= 0) & (found < most)).all():
        raise AtomError(f"{what}: actions are whole numbers from 0 to {most - 1}, {list(shape)} of them")
