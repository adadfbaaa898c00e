"""Frames foretold by a world model: one step ahead, and as far as it imagines."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.metrics import Result, mean
from atom_jax.evaluation.tasks.plan import PlanSettings, episodes, world_of
from atom_jax.inference import imagine
from atom_jax.models import world
from atom_jax.models.hnet import ports
from atom_jax.models.world import WorldConfig
from atom_jax.typing import FRAMES, LM


@dataclasses.dataclass(frozen=True)
class FrameSettings:
    """env, episodes, length, seed: as of `plan.PlanSettings`. horizon: steps that are imagined after the watch."""

    env: str = ""
    episodes: int = 100
    length: int = 0
    horizon: int = 6
    seed: int = 0

    def __post_init__(self):
        count = (0, 2**31 - 1)
        config.check(self, episodes=(1, 2**20), length=count, horizon=(1, 1024), seed=count)


@dataclasses.dataclass(frozen=True)
class Foretold:
    """frames: nats per frame, from all layers and from the encoder alone; the share of frames that are foretold as
    they come (`right` of the port), where each is imagined from the real one before (step) and from imagined ones
    alone (imagined); frames per unit. All but nats and units are about what follows the watch, under random
    actions."""

    settings = FrameSettings()
    reads = FRAMES

    def run(self, lm: LM, settings: FrameSettings, encoder: Encoder | None, out: pathlib.Path | None) -> Result:
        """See `tasks.task.Runner`."""
        env, length = world_of(PlanSettings(settings.env, length=settings.length))
        cfg, key = imagine.checked(lm, env, "frames"), jax.random.key(settings.seed)
        watched = length + 1
        episode = episodes(env, key, settings.episodes, watched + settings.horizon)[0]
        found = jax.device_get(_read(lm.params, episode, cfg, watched))
        state = imagine.observe(lm, jax.tree.map(lambda x: x[:, :watched], episode))
        free = imagine.imagine(lm, state, episode.action[:, None, watched - 1 : -1]).frames[:, 0]
        real = np.asarray(episode.obs)[:, watched:]
        same = lambda x: np.asarray(ports.of(cfg).right(x, real, cfg)).mean(1)  # noqa: E731
        right = [same(x) for x in (found["ahead"], np.asarray(free))]
        metrics = {"nats": mean(found["nats"]), "local_nats": mean(found["local"])}
        metrics |= {"step": mean(right[0]), "imagined": mean(right[1]), "frames_per_unit": mean(found["per_unit"])}
        return Result(metrics, settings.episodes)


@functools.partial(jax.jit, static_argnames=("cfg", "watched"))
def _read(p: Any, episode: Any, cfg: WorldConfig, watched: int) -> dict[str, jax.Array]:
    """Of every episode, f32 [b]: nats per frame, local ones, and frames per unit; and the likeliest frames after the
    first `watched`, each from the real one before."""
    port = ports.of(cfg)
    episode = episode.replace(obs=port.encode(p, episode.obs, cfg))
    out, _ = world.apply(p, episode, cfg=imagine.roomy(cfg))
    found = out.aux["foresight"]
    nats, local = (jnp.mean(port.nll(x[:, :-1], episode.obs[:, 1:], cfg), axis=1) for x in (found.frame, found.local))
    units = jnp.sum(out.aux["boundaries"][0], axis=1)
    per_unit = episode.obs.shape[1] / jnp.maximum(units, 1)
    ahead = port.decode(p, port.sample(found.frame[:, watched - 1 : -1], None, cfg), cfg)
    return {"nats": nats, "local": local, "per_unit": per_unit, "ahead": ahead}
