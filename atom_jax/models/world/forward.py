"""The forward pass of a world model, and what its states foretell."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax.chunking.types import Boundary
from atom_jax.kvcache.memory import Memory
from atom_jax.models.hnet import forward as hnet
from atom_jax.models.hnet import ports
from atom_jax.models.world.config import END, REWARD, WorldConfig
from atom_jax.nn.attention import Tokens
from atom_jax.nn.linear import project
from atom_jax.params import Tree
from atom_jax.typing import Frames, Output
from atom_jax.units import Place, Stage


@struct.dataclass
class Foresight:
    """What is foretold at every position of what its action leads to.

    frame: the port's prediction of the next frame, as logits f32 [b, t, cells, classes] of cells. local: the same
    from the encoder's states alone. outcome: f32 [b, t, 3], logits of `config.NOTHING`, REWARD and END, or [b, t, 2],
    the reward and the logit of an end. secret: logits f32 [b, t, secrets] of what the world hides, or None.
    """

    frame: jax.Array
    local: jax.Array
    outcome: jax.Array
    secret: jax.Array | None


def apply(p: Tree, batch: Frames, *, cfg: WorldConfig, cache: Memory | None = None) -> tuple[Output, Memory | None]:
    """Predictions of the next frames (`Foresight.frame`), with all that is foretold and what was learned in `aux`
    ("foresight"; the others as of `hidden`), and the cache. batch: frames as the port reads them (its `encode`)."""
    x_bte, cache, aux = hidden(p, batch, cfg=cfg, cache=cache)
    found = outputs(p, x_bte, cfg=cfg)
    return Output(logits=found.frame, aux=aux | {"foresight": found}), cache


def hidden(
    p: Tree, batch: Frames, *, cfg: WorldConfig, cache: Memory | None = None, key: jax.Array | None = None
) -> tuple[jax.Array, Memory | None, dict[str, Any]]:
    """States [b, t, 3 d] of frames with their actions: of the encoder, what is read of the units, and of the decoder,
    side by side; the cache after these frames, and what was learned (`units.report`, and the port's metrics).

    key: noise of the boundary rules while training; None = none.
    """
    port = ports.of(cfg)

    def foresee(before_btd: jax.Array) -> jax.Array:
        return port.nll(port.read(p["local"], before_btd.astype(cfg.dtype), cfg), batch.obs, cfg)

    def parts(stage: Stage) -> Stage:
        def combine(h_btd: jax.Array, w_btd: jax.Array, boundary: Boundary) -> jax.Array:
            return jnp.concatenate([h_btd, w_btd.astype(h_btd.dtype), stage.combine(h_btd, w_btd, boundary)], axis=-1)

        def decode(y_bte: jax.Array, states: Any, place: Place) -> tuple[jax.Array, Any, dict[str, tuple]]:
            beside, y_btd = jnp.split(y_bte, [2 * cfg.d_model[0]], axis=-1)
            x_btd, states, said = stage.decode(y_btd, states, place)
            return jnp.concatenate([beside, x_btd], axis=-1), states, said

        return dataclasses.replace(stage, combine=combine, decode=decode, foresee=foresee)

    return hnet.hidden(p, batch, cfg=cfg, cache=cache, key=key, parts=parts)


def outputs(p: Tree, x_bte: jax.Array, *, cfg: WorldConfig) -> Foresight:
    """What states [b, t, 3 d] foretell. The head multiplies: what is remembered meets what is done."""
    port, head, d = ports.of(cfg), p["head"], cfg.d_model[0]
    z_btf = jax.nn.silu(project(x_bte, head["gate"])) * project(x_bte, head["up"])
    local = port.read(p["local"], x_bte[..., :d], cfg)
    outcome = project(z_btf, head["outcome"]).astype(jnp.float32)
    secret = project(x_bte[..., d : 2 * d], head["secret"]).astype(jnp.float32) if cfg.secrets else None
    return Foresight(local + port.read(head["frame"], z_btf, cfg), local, outcome, secret)


def logits(p: Tree, x_bte: jax.Array, *, cfg: WorldConfig) -> jax.Array:
    """Predictions of the next frames from states [b, t, 3 d]."""
    return outputs(p, x_bte, cfg=cfg).frame


def local(p: Tree, batch: Frames, *, cfg: WorldConfig) -> jax.Array:
    """The local predictions alone: of all layers only those of the encoder run."""
    tokens, port = Tokens(batch.positions, batch.segments), ports.of(cfg)
    x_btd, _, _ = port.inlet(p, batch, tokens, None, cfg)
    h_btd, _, _ = hnet.stage(0, hnet.Call(p, cfg)).encode(x_btd, None, Place(tokens))
    return port.read(p["local"], h_btd, cfg)


def expected(found: Foresight) -> tuple[jax.Array, jax.Array]:
    """The reward f32 [b, t] to expect of a step, and the probability that it ends the episode."""
    if found.outcome.shape[-1] == 2:
        return found.outcome[..., 0], jax.nn.sigmoid(found.outcome[..., 1])
    share = jax.nn.softmax(found.outcome, axis=-1)
    return share[..., REWARD], share[..., REWARD] + share[..., END]
