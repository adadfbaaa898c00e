"""What ports of frames have in common: a vector of what is seen, with the action taken at it, and what is counted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.nn.linear import project
from atom_jax.nn.norm import rms_norm
from atom_jax.params import ParamSpec, Tree, normal, ones
from atom_jax.sharding import constrain
from atom_jax.typing import Frames


def spec(d: int, hidden: int, actions: int) -> Tree:
    """Parameters of `vectors`, of width d: inlet, a layer with so many hidden units, and action."""
    tree: Tree = {
        "inlet": {
            "norm": ParamSpec((d,), (None,), ones),
            "up": ParamSpec((d, hidden), ("embed", "mlp"), normal(d**-0.5)),
            "down": ParamSpec((hidden, d), ("mlp", "embed"), normal(hidden**-0.5)),
        }
    }
    return tree | ({"action": ParamSpec((actions, d), ("vocab", "embed"), normal(1.0))} if actions else {})


def vectors(p: Tree, x_btd: jax.Array, batch: Frames, cfg: Any) -> jax.Array:
    """Vectors [b, t, d] of frames with their actions: x and the embedding of the action, after a GELU layer with a
    residual."""
    if "action" in p:
        x_btd = x_btd + jnp.take(p["action"], batch.action, axis=0).astype(x_btd.dtype)
    y_btd = rms_norm(x_btd, p["inlet"]["norm"], cfg.norm_eps)
    y_btd = y_btd + project(jax.nn.gelu(project(y_btd, p["inlet"]["up"])), p["inlet"]["down"])
    return constrain(y_btd, "batch", None, None)


def encode(p: Tree, obs: jax.Array, cfg: Any) -> jax.Array:
    """Frames as the model reads them: as they are."""
    return obs


def decode(p: Tree, read: jax.Array, cfg: Any) -> jax.Array:
    """The inverse of `encode`."""
    return read


def outlet(p: Tree, x_btd: jax.Array, cfg: Any) -> jax.Array:
    """Predictions float32 of the next frame: logits [b, t, cells, classes] (or
    registers, codes), or means of pixels [b, t, *grid]."""
    return read(p["unembed"], x_btd, cfg)


def read(p: Tree, x_btd: jax.Array, cfg: Any) -> jax.Array:
    """As `outlet`, with parameters of its own (`outlet_spec`)."""
    return project(x_btd, p["w"]).astype(jnp.float32) + p["b"].astype(jnp.float32)[None, None]


def metrics(mark_bt: jax.Array, batch: Frames, kind: str) -> dict[str, jax.Array]:
    """units_at_events: of the units, those at frames of which the data knows that something happens in them, and
    events_at_units, of these those that are units, where the data says (`Frames.marks`)."""
    if batch.marks is None:
        return {}
    event = batch.marks & (batch.segments > 0)
    both, units, events = (jnp.sum(x, dtype=jnp.float32) for x in (mark_bt & event, mark_bt, event))
    return {"units_at_events": jnp.stack([both, units]), "events_at_units": jnp.stack([both, events])}


def acting(actions: int) -> str:
    """The actions in words, after a comma; nothing where there are none."""
    return f", {actions} actions" if actions > 1 else f", {actions} action" if actions else ""
