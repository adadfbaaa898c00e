"""Worlds to watch and to act in: pure functions of JAX, so that an episode is made inside a compiled step.

A new one is one file and one entry of `ENVS`.
"""

from __future__ import annotations

from atom_jax import config
from atom_jax.data.envs.environment import Environment, Followed, check_actions, episodes, follow
from atom_jax.data.envs.minigrid import Minigrid
from atom_jax.data.envs.video import Video
from atom_jax.data.envs.watch import Watch

__all__ = [
    "ENVS",
    "Environment",
    "Followed",
    "Minigrid",
    "Video",
    "Watch",
    "check_actions",
    "episodes",
    "follow",
    "parse",
]

ENVS: dict[str, type[Environment]] = {env.name: env for env in (Watch, Video, Minigrid)}


def parse(text: str | Environment) -> Environment:
    """The environment that a text such as "watch:size=5,least=32,most=48" names. An environment is itself.

    Raises AtomError for an unknown name, an unknown field or an unreadable value.
    """
    if isinstance(text, Environment):
        return text
    return config.named(str(text), ENVS, "env")
