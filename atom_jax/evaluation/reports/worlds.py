"""What a world model sees in an episode, and what it imagines after it, for pictures and as text."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.chunking import rules
from atom_jax.chunking.rules.surprise import Surprise
from atom_jax.chunking.types import START
from atom_jax.data import envs
from atom_jax.evaluation.reports.frame_strip import Strip
from atom_jax.evaluation.reports.future_picture import Imagination
from atom_jax.evaluation.tasks.plan import PlanSettings, episodes, world_of
from atom_jax.inference import imagine, planners
from atom_jax.models import world
from atom_jax.models.hnet import ports
from atom_jax.models.world import WorldConfig
from atom_jax.typing import LM, Frames


def seen(lm: LM, env: str, length: int = 0, seed: int = 0) -> Strip:
    """The units that a model makes of an episode of a world, as the training data have it: `length` frames that are
    watched (0: 40 of `watch`), and some more in which something is done. Raises AtomError as `imagined` does."""
    made, watched = world_of(PlanSettings(env=env, length=length, seed=seed))
    cfg, frames = imagine.checked(lm, made, "units"), max(made.frames, watched + 1)
    episode, _ = episodes(made, jax.random.key(seed), 1, frames)
    marks, nats = (np.asarray(x)[0] for x in _read(lm.params, episode, cfg))
    rule = cfg.chunking[0].rule
    # A unit begins after the end of the one before.
    begins = marks if rules.of(rule).KIND == START else np.concatenate([[True], marks[:-1]])
    pictures = np.stack([made.render(obs) for obs in np.asarray(episode.obs[0])])
    tau = float(lm.params["stage0"]["rule"]["tau"]) if isinstance(rule, Surprise) else None
    # Nothing foretold the first frame.
    surprise = np.concatenate([[0.0], nats]) if tau is not None else None
    return Strip(pictures, begins, surprise, tau)


@functools.partial(jax.jit, static_argnames="cfg")
def _read(p: Any, episode: Frames, cfg: WorldConfig) -> tuple[jax.Array, jax.Array]:
    """Where units begin or end in episodes, bool [b, t], and the nats f32 [b, t - 1] of all frames but the first."""
    port = ports.of(cfg)
    episode = episode.replace(obs=port.encode(p, episode.obs, cfg))
    aux = world.hidden(p, episode, cfg=imagine.roomy(cfg))[2]
    local = world.local(p, episode, cfg=cfg)
    return aux["boundaries"][0], port.nll(local[:, :-1], episode.obs[:, 1:], cfg)


@dataclasses.dataclass(frozen=True)
class Report:
    """A picture's content, and what is said of it."""

    said: Imagination
    text: str


def imagined(
    lm: LM, env: str, actions: list[int], futures: int = 4, length: int = 0, seed: int = 0, draw: bool = False
) -> Report:
    """What a model has come of actions after a watch of `length` frames, and of others of equal number drawn by
    chance; beside what really comes of the first.

    Raises AtomError for an unknown world, one of another kind than the model's, and actions that it doesn't have.
    """
    made, watched = world_of(PlanSettings(env=env, length=length, seed=seed))
    cfg = imagine.checked(lm, made, "imagine")
    first = envs.check_actions(made, [actions], "--actions")
    key = jax.random.key(seed)
    episode, last = episodes(made, jax.random.fold_in(key, 0), 1, watched + 1)
    others = jax.random.randint(jax.random.fold_in(key, 1), (futures - 1, len(actions)), 0, made.actions)
    rows = jnp.concatenate([first, others])
    state = imagine.observe(lm, episode)
    out = imagine.imagine(lm, state, rows[None], jax.random.fold_in(key, 2) if draw else None)
    real = jax.jit(envs.follow, static_argnums=0)(made, jax.random.fold_in(key, 3), last, first)
    values = np.asarray(planners.returns(out.reward, out.done, cfg.gamma))[0]
    pictures = np.stack([[made.render(o) for o in future] for future in np.asarray(out.frames[0])])
    shown = np.stack([made.render(o) for o in np.asarray(real.obs[0])])
    best = int(values.argmax())
    said = Imagination(pictures, values, shown, best, [[str(a) for a in row] for row in np.asarray(rows).tolist()])
    lines = [f"{watched} frames watched, {int(state.units[0])} units in them"]
    for i, (row, value) in enumerate(zip(np.asarray(rows).tolist(), values)):
        units = int(out.units[0, i].sum())
        lines.append(f"{','.join(map(str, row))}: return {value:.2f}, {units} units{' (best)' if i == best else ''}")
    right = float(np.mean(ports.of(cfg).right(out.frames[:, 0], real.obs, cfg)))
    lines.append(f"really: reward {float(real.reward.sum()):g}; {right:.0%} of the first future's frames are so")
    return Report(said, "\n".join(lines))
