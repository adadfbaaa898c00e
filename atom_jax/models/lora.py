"""LoRA: tuning a transformer by corrections of low rank beside its projections (Hu et al., 2021).

The corrections lie under "lora" in every layer ("layers/lora/q_a", "layers/lora/q_b" and so on); the weights that
they correct stay as they are until both are merged.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import config, params
from atom_jax.nn import low_rank
from atom_jax.nn.low_rank import Corrected
from atom_jax.params import Tree
from atom_jax.typing import AtomError

# Where a layer has the projections, and how many leading axes of each are inputs.
_BLOCKS = {"attn": low_rank.ATTENTION, "mlp": low_rank.MLP}
INPUTS = {name: count for block in _BLOCKS.values() for name, count in block.items()}
_PATHS = {name: f"layers/{block}/{name}" for block, names in _BLOCKS.items() for name in names}


@dataclasses.dataclass(frozen=True)
class LoRA:
    """rank: of every correction. alpha: a correction counts alpha / rank times. targets: the projections that have
    one, of q, k, v and o in attention and gate, up and down in the MLP."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = tuple(INPUTS)

    def __post_init__(self):
        config.check(self, rank=(1, 2**16), alpha=(1e-6, 1e6))
        if not self.targets or set(self.targets) - INPUTS.keys() or len(set(self.targets)) < len(self.targets):
            raise AtomError(f"lora.targets: expected some of {', '.join(INPUTS)}, got {', '.join(self.targets)}")

    @property
    def scale(self) -> float:
        """Factor on every correction."""
        return self.alpha / self.rank


def spec(layer: Tree, lora: LoRA) -> Tree:
    """ParamSpecs of the corrections of one layer, whose own are given."""
    out = {}
    for block, inputs in _BLOCKS.items():
        out |= low_rank.spec(layer[block], {n: i for n, i in inputs.items() if n in lora.targets}, lora.rank)
    return out


def paths(cfg: Any) -> frozenset[str]:
    """Paths of the corrections of a model; none where it has none."""
    if (lora := getattr(cfg, "lora", None)) is None:
        return frozenset()
    return frozenset(f"layers/lora/{name}_{part}" for name in lora.targets for part in "ab")


def without(cfg: Any) -> Any:
    """The configuration of the same model without corrections, as it is once they are merged."""
    return cfg if getattr(cfg, "lora", None) is None else dataclasses.replace(cfg, lora=None)


def beside(p: Tree, lora: LoRA) -> Tree:
    """The parameters of a layer with `Corrected` projections, and without "lora"."""
    out = {name: x for name, x in p.items() if name != "lora"}
    for block, names in _BLOCKS.items():
        mine = [name for name in names if name in lora.targets]
        pairs = {name: (p["lora"][f"{name}_a"], lora.scale * p["lora"][f"{name}_b"]) for name in mine}
        out[block] = p[block] | {name: Corrected(p[block][name], *pair) for name, pair in pairs.items()}
    return out


def merged(p: Tree, lora: LoRA | None) -> Tree:
    """The parameters of a model with the corrections added to its weights, in their dtype and place; unchanged where
    there are none."""
    if lora is None or "lora" not in p["layers"]:
        return p
    leaves = params.flatten(p)
    for name in lora.targets:
        path = _PATHS[name]
        a, b = (leaves.pop(f"layers/lora/{name}_{part}") for part in "ab")
        place = getattr(leaves[path], "sharding", None)
        leaves[path] = jax.jit(functools.partial(_added, scale=lora.scale), out_shardings=place)(leaves[path], a, b)
    return params.unflatten(leaves)


def _added(w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    single = (x.astype(jnp.float32) for x in (w, a, scale * b))
    with jax.default_matmul_precision("highest"):
        return jax.vmap(low_rank.added)(*single).astype(w.dtype)
