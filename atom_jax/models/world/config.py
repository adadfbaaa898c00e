"""The configuration of a world model, and the parameters that it describes."""

from __future__ import annotations

import dataclasses
from typing import Any

from atom_jax import config
from atom_jax.models.hnet import config as hnet
from atom_jax.models.hnet import ports
from atom_jax.models.hnet.ports import Cells
from atom_jax.params import ParamSpec, Tree, normal
from atom_jax.typing import AtomError

# What a step brings: nothing, a reward, or an end without one.
NOTHING, REWARD, END = range(3)


@config.register
@dataclasses.dataclass(frozen=True)
class WorldConfig(hnet.HNetConfig):
    """A model with learned units whose positions are frames, each with the action taken at it."""

    family: str = "world"
    port: Any = dataclasses.field(default_factory=lambda: Cells(actions=4))
    # Width of the head.
    hidden: int = 128
    # What is foretold of rewards: "classes", of a step that brings nothing, a reward of 1, or an end without one; or
    # "scalar", the reward itself, and the probability of an end.
    reward: str = "classes"
    # Discount of later rewards, for plans.
    gamma: float = 0.95
    # Values of what the world hides, which units learn to know where the training data says it; 0 = nothing.
    secrets: int = 0
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        config.check(self, hidden=(1, 2**24), gamma=(0, 1), secrets=(0, 2**20))
        if self.reward not in ("classes", "scalar"):
            raise AtomError(f"reward: expected classes or scalar, got {self.reward!r}")
        if not ports.frames(self):
            raise AtomError(f"port: a world model reads frames, and {type(self.port).__name__} reads ids")
        if len(self.layout) < 3:
            raise AtomError("layout: a world model has an encoder, a main network and a decoder, or more of them")
        if any(c.pack for c in self.chunking):
            raise AtomError("pack: rows of frames do not share their slots")

    @property
    def outcomes(self) -> int:
        """Numbers with which a step's outcome is foretold."""
        return 3 if self.reward == "classes" else 2


def spec(cfg: WorldConfig) -> Tree:
    """ParamSpec tree: the port's inlet, local (the outlet of the encoder's states), the stages, and head."""
    tree, d, f, port = hnet.spec(cfg), cfg.d_model[0], cfg.hidden, ports.of(cfg)
    tree["local"] = tree.pop("unembed")
    head = {
        "gate": ParamSpec((3 * d, f), ("embed", "mlp"), normal((3 * d) ** -0.5)),
        "up": ParamSpec((3 * d, f), ("embed", "mlp"), normal((3 * d) ** -0.5)),
        "frame": port.outlet_spec(cfg, f, 0.02),
        "outcome": ParamSpec((f, cfg.outcomes), ("mlp", None), normal(f**-0.5)),
    }
    if cfg.secrets:
        head["secret"] = ParamSpec((d, cfg.secrets), ("embed", None), normal(d**-0.5))
    return tree | {"head": head}
