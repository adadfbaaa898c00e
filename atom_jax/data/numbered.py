"""Rows that a program makes of their numbers: of episodes, which a training step makes itself (`data.envs`).

Numbers begin at 1: those that tests draw (`evaluation.tasks.plan`) come from number 0, so that nothing is trained on
them, whatever the seeds.
"""

from __future__ import annotations

import numpy as np

from atom_jax.data.config import SPLITS, DataConfig
from atom_jax.typing import AtomError

Rows = dict[str, np.ndarray]
PREFIX = "env:"


def is_numbered(cfg: DataConfig) -> bool:
    """Whether a configuration is about a world. Raises AtomError for a world among other sources."""
    worlds = [source for source in cfg.sources if source.startswith(PREFIX)]
    if worlds and len(cfg.sources) > 1:
        raise AtomError(f"data.sources: {worlds[0]} is a world, which goes with no other source")
    return bool(worlds)


def world_of(cfg: DataConfig) -> str:
    """The name of the world. Raises AtomError where the sources are texts."""
    if not is_numbered(cfg):
        raise AtomError(f"data.sources: expected one world, such as {PREFIX}watch, got {', '.join(cfg.sources)}")
    return cfg.sources[0].removeprefix(PREFIX)


def stream(cfg: DataConfig) -> int:
    """What sets the rows of a configuration apart from those of other splits and seeds."""
    return cfg.seed if cfg.split == "train" else -1 - SPLITS.index(cfg.split)


class NumberedRows:
    """The given rows of every batch: {"number": i32 [rows], "stream": i32 [rows], "loss_mask": bool [rows, seq_len]},
    whose last position has no target."""

    def __init__(self, cfg: DataConfig, numbers: range):
        world_of(cfg)
        names = ("split", "seq_len", "batch_size", "seed")
        source = {"sources": list(cfg.sources), "pieces": [2**31]}
        self._identity = {name: getattr(cfg, name) for name in names} | source
        self._cfg, self._numbers, self._at = cfg, numbers, 0

    def __iter__(self) -> NumberedRows:
        return self

    def __next__(self) -> Rows:
        rows = described(self._cfg, len(self._numbers))
        rows["number"] += np.arange(self._numbers.start, self._numbers.stop, dtype=np.int32) + 1
        # Past the end of what 32 bits count, rows come again.
        rows["number"] += np.int32(self._at * self._cfg.batch_size % 2**30)
        self._at += 1
        return rows

    def get_state(self) -> dict:
        """Where the rows are, in JSON's types."""
        rows = len(self._numbers)
        config = dict(self._identity)
        return {"config": config, "first_row": self._numbers.start, "piece": [self._at] * rows, "used": [0] * rows}

    def set_state(self, state: dict) -> None:
        """Continues after the batch that was returned last before the state was taken. Raises AtomError for a state
        of other rows."""
        if not isinstance(state, dict) or state.get("config") != self._identity or not state.get("piece"):
            raise AtomError("The data state is not one of these episodes: data.sources or their sizes have changed.")
        self._at = int(state["piece"][0])

    def close(self) -> None:
        """Nothing is open."""


def described(cfg: DataConfig, rows: int) -> Rows:
    """Rows of number 0."""
    mask = np.ones((rows, cfg.seq_len), bool)
    mask[:, -1] = False
    return {"number": np.zeros(rows, np.int32), "stream": np.full(rows, stream(cfg), np.int32), "loss_mask": mask}
