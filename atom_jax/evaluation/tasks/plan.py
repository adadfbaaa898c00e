"""Planning with a world model: watch episodes, imagine, act, and compare with who knows the world."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.data import envs
from atom_jax.data.envs import Environment, Watch
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.metrics import Result, mean, proportion
from atom_jax.inference import imagine, planners
from atom_jax.inference.imagine import WorldState
from atom_jax.inference.planners import Futures, Planner
from atom_jax.inference.play import Played, play, simulator
from atom_jax.kvcache import memory
from atom_jax.models.world import WorldConfig
from atom_jax.params import nbytes
from atom_jax.typing import FRAMES, LM


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """What world, and how plans are made in it.

    env: as of `data.envs.parse`; "": that of the training run's last stage, or watch.
    planner: as of `inference.planners.parse`.
    episodes: how many are planned, all at once. seed: of the episodes and of the planner.
    length: frames that are watched before the first plan (0: `Environment.watched`).
    """

    env: str = ""
    planner: str = "shooting:n=48,horizon=6"
    episodes: int = 200
    length: int = 0
    seed: int = 0

    def __post_init__(self):
        count = (0, 2**31 - 1)
        config.check(self, episodes=(1, 2**20), length=count, seed=count)


@dataclasses.dataclass(frozen=True)
class Planning:
    """plan: the share of episodes in which what was planned brings a reward, with what it took."""

    settings = PlanSettings()
    reads = FRAMES

    def run(self, lm: LM, settings: PlanSettings, encoder: Encoder | None, out: pathlib.Path | None) -> Result:
        """See `tasks.task.Runner`."""
        report = planned(lm, settings)
        metrics = {name: proportion(report["episodes_of"][name]) for name in ("success", "wrong", "ceiling")}
        metrics["main_steps_watch"] = mean(report.pop("units_of"))
        return Result(metrics, settings.episodes, {k: v for k, v in report.items() if k != "episodes_of"})


def planned(lm: LM, settings: PlanSettings) -> dict[str, Any]:
    """What planning came to. success, wrong (an end without a reward), ceiling (shares of episodes; of the last those
    in which a reward can be reached with as many steps as are played, or where the world does not know it that of the
    simulator), simulator (success of the same planner that knows the world), random; interval, of success, 95%.

    Per episode: main_steps_watch, frames of the watch at which the main network ran; main_steps_decision, runs per
    future at its first step, whose frame is real; main_steps_imagined, per future at all others (what `mpc` reads
    between its plans is in none of them); units held at the decision, and read by a query there; bytes of the
    model's memory, and bytes_future, of what one more future needs. seconds_watch, seconds: of the watch, and of the
    decision with what is played, all episodes at once, compiled before. episodes_of, units_of: the same of each
    episode.
    Raises AtomError for an unknown world or planner, and for one of another kind than the model's.
    """
    env, length = world_of(settings)
    planner, cfg, b = planners.parse(settings.planner), imagine.checked(lm, env, "plan"), settings.episodes
    key = jax.random.key(settings.seed)
    episode, last = episodes(env, jax.random.fold_in(key, 0), b, length + 1)
    seconds, state = _timed(lambda: imagine.observe(lm, episode))
    turns = -(-planner.horizon // planner.played) * planner.played
    held, read = (np.asarray(x) for x in memory.use(state.cache.parts.inside))
    fitted = memory.fit(state.cache, turns + planner.horizon)
    # Frames are imagined one after another; those that were played are read at once, where plans follow.
    replans = planner.played < planner.horizon
    room = state.replace(cache=memory.grow(fitted, turns + 1) if replans else fitted)
    arguments = lm.params, room, last, jax.random.fold_in(key, 1)
    took, (acted, ends) = _timed(lambda: _play(*arguments, env, planner, cfg))
    known, _ = _simulated(last, jax.random.fold_in(key, 1), env, planner, cfg.gamma)
    chance, _ = _simulated(last, jax.random.fold_in(key, 1), env, planners.Random(turns), cfg.gamma)
    success, wrong, decision, imagined = ends
    futures = b * float(np.sum(acted["futures"]))
    can = _reachable(last, env, turns)
    can = known if can is None else can
    units = np.asarray(state.units)
    forks = [jax.eval_shape(lambda s, n=n: imagine.forked(s, n, planner.horizon).cache, room) for n in (1, 2)]
    return {
        "success": float(success.mean()), "interval": interval(float(success.mean()), b),
        "wrong": float(wrong.mean()), "ceiling": float(can.mean()), "simulator": float(known.mean()),
        "random": float(chance.mean()),
        "main_steps_watch": float(units.mean()), "main_steps_decision": float(decision) / futures,
        "main_steps_imagined": float(imagined) / futures, "units": float(held.mean()),
        "frames": length, "futures": futures / b, "horizon": planner.horizon,
        "bytes": nbytes(state.cache) / b, "bytes_future": (nbytes(forks[1]) - nbytes(forks[0])) / b,
        "read": float(read.mean()),
        "seconds_watch": seconds, "seconds": took,
        "episodes_of": {"success": success.tolist(), "wrong": wrong.tolist(), "ceiling": can.tolist()},
        "units_of": units.tolist(),
    }  # fmt: skip


def text(report: dict[str, Any]) -> str:
    """What `planned` found, in lines."""
    low, high = report["interval"]
    compared = ", ".join(f"{name} {report[name]:.2f}" for name in ("wrong", "ceiling", "simulator", "random"))
    watch, held = report["main_steps_watch"], report["units"]
    return "\n".join([
        f"success {report['success']:.3f} ({low:.2f} to {high:.2f}), {compared}",
        f"{watch:.1f} steps of the main network for {report['frames']} frames, {held:.1f} units held",
        f"{report['futures']:.0f} futures of {report['horizon']} steps: {report['main_steps_decision']:.2f} at the "
        f"first step of each, {report['main_steps_imagined']:.3f} at all others",
        f"{report['seconds_watch']:.2f} s to watch and {report['seconds']:.2f} s to decide, all episodes at once",
    ])  # fmt: skip


def world_of(settings: PlanSettings) -> tuple[Environment, int]:
    """The world and the frames that are watched before the first action. Raises AtomError for an unknown one."""
    env = envs.parse(settings.env or Watch.name)
    length = settings.length or env.watched
    return env.lasting(length), length


def interval(share: float, n: int, z: float = 1.96) -> list[float]:
    """Wilson's interval of a share of n observations (Wilson, 1927)."""
    middle, wide = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [max(0.0, (middle - wide) / (1 + z * z / n)), min(1.0, (middle + wide) / (1 + z * z / n))]


def _timed(run: Any) -> tuple[float, Any]:
    """Seconds of the second of two runs, the first of which compiles, and what it gave."""
    jax.block_until_ready(run())
    began = time.perf_counter()
    found = jax.block_until_ready(run())
    return time.perf_counter() - began, found


@functools.partial(jax.jit, static_argnames=("env", "n", "frames"))
def episodes(env: Environment, key: jax.Array, n: int, frames: int) -> Any:
    """As `data.envs.episodes`, compiled."""
    return envs.episodes(env, key, n, frames)


@functools.partial(jax.jit, static_argnames=("env", "planner", "cfg"))
def _play(
    p: Any, state: WorldState, last: Any, key: jax.Array, env: Environment, planner: Planner, cfg: WorldConfig
) -> tuple[dict[str, jax.Array], tuple]:
    """The sums of what all plans took; (success, wrong: bool [b]; main steps at first steps and at others)."""

    def think(mind: WorldState, real: Any, key: jax.Array) -> Futures:
        return imagine.futures(p, mind, planner.horizon, cfg)

    def notice(mind: WorldState, actions: jax.Array, led: Any) -> WorldState:
        if planner.played == planner.horizon:  # nothing is planned after the only turn
            return mind
        return imagine.read(p, mind, imagine.after(p, mind, actions, led.obs, cfg), imagine.roomy(cfg))[0]

    done = play(env, planner, key, last, imagine.settled(state), think, notice)
    stats = done.plans.stats
    decision, imagined = (jnp.sum(stats[name]) for name in ("main_steps", "main_steps_imagined"))
    return stats, (*_ends(done), decision, imagined)


@functools.partial(jax.jit, static_argnames=("env", "planner", "gamma"))
def _simulated(last: Any, key: jax.Array, env: Environment, planner: Planner, gamma: float) -> tuple:
    """Success and wrong, bool [b] each, of a planner that knows the world."""
    think = lambda mind, real, key: simulator(env, real, key, gamma)  # noqa: E731
    return _ends(play(env, planner, key, last, (), think, lambda mind, *_: mind))


def _ends(done: Played) -> tuple[jax.Array, jax.Array]:
    success = jnp.sum(done.reward, axis=1) > 0
    return success, jnp.any(done.done, axis=1) & ~success


@functools.partial(jax.jit, static_argnames=("env", "within"))
def _reachable(last: Any, env: Environment, within: int) -> jax.Array | None:
    return jax.vmap(lambda state: env.reachable(state, within))(last)
