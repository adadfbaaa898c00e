"""Writes episodes of an environment, whose actions are drawn by its own policy, to a file.

    python -m atom_jax.data.envs watch --episodes=4000 --out=watch.npz [--frames=54] [--seed=0]

The environment is written with its fields: watch:size=7,least=8,most=12. The file (.npz) holds obs, action, reward,
done, positions, segments and marks, [episodes, frames, ...], as of `atom_jax.typing.Frames`; marks are the frames
with something that those before don't tell.
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags

from atom_jax import config, terminal
from atom_jax.data.envs import parse, stored
from atom_jax.typing import AtomError

USAGE = "python -m atom_jax.data.envs ENV --episodes=N --out=FILE.npz [--frames=N] [--seed=N]"


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""

    def command() -> None:
        values = flags.FlagValues()
        flags.DEFINE_integer("episodes", 4000, "how many", flag_values=values)
        flags.DEFINE_integer("frames", None, "of each", flag_values=values)
        flags.DEFINE_integer("seed", 0, "of what is drawn", flag_values=values)
        flags.DEFINE_string("out", None, "file", flag_values=values)
        rest = values(argv)[1:]
        if len(rest) != 1 or not values.out:
            raise AtomError(f"usage: {USAGE}")
        env = parse(rest[0])
        n = config.whole("--episodes", values.episodes, 1)
        frames = config.whole("--frames", values.frames if values.frames is not None else env.frames, 1)
        if not (folder := pathlib.Path(values.out).parent).is_dir():
            raise AtomError(f"--out={values.out}: there is no folder {folder}")
        made = stored.made(env, config.whole("--seed", values.seed), n, frames)
        stored.save(values.out, rest[0], made)
        marks = made.marks.sum() / n
        print(
            f"{values.out}: {n:,} episodes of {frames:,} frames, {marks:.1f} of which on average hold something new"
        )

    return terminal.run("envs", command)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
