"""Tokens that are added in rounds: ALIT (Duggal et al., 2025, "Adaptive Length Image Tokenization via Recurrent
Allocation").

Letters: those of `forward`; n rounds, of r / n registers each.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import config
from atom_jax.models.image_tokens import forward
from atom_jax.models.image_tokens.lengths import Choices, Length, Trained, vectors
from atom_jax.models.image_tokens.quantise import Quantised, unit
from atom_jax.nn import vit
from atom_jax.params import Tree
from atom_jax.typing import AtomError


@struct.dataclass
class Round:
    """What a round comes to: x [b, t, d], the encoder's class token, patches and registers; found: codes of all
    registers, of which keep_br exist; patches f32 [b, p, c] decoded from these."""

    x: jax.Array
    found: Quantised
    keep: jax.Array
    patches: jax.Array


@config.register
@dataclasses.dataclass(frozen=True)
class Rounds(Length):
    """Every round appends registers and runs the same encoder over everything. Patches that came out well are hidden
    from later rounds. An image gets as many rounds as it needs.

    count: rounds, which divide `registers`. weights: of the rounds' errors in the loss; the last one counts for those
    after it. halt: a patch is hidden where p >= halt: in training with probability p, later always (the code draws
    then, too, and after the last round). scale: p = exp(-squared error / scale). (The paper's p is that of a patch's
    code in a tokenizer below this one; pixels have none.)
    """

    count: int = 4
    weights: tuple[float, ...] = (2.5, 2.0, 1.5, 1.25, 1.0)
    halt: float = 0.55
    scale: float = 0.003

    def __post_init__(self):
        config.check(self, count=(1, 2**10), weights=(0, 1e6), halt=(0, 1), scale=(1e-9, 1e6))
        if not self.weights:
            raise AtomError("weights: expected at least one")

    def check(self, cfg: Any) -> None:
        if cfg.registers % self.count:
            raise AtomError(f"length.count: {self.count} rounds do not divide {cfg.registers} registers")
        if cfg.mask != "full":
            raise AtomError("mask: registers that are added in rounds need full")

    def spec(self, cfg: Any) -> dict[str, Tree]:
        d, each = cfg.d_model, cfg.registers // self.count
        both = {"class": vectors(d), "positions": vectors(cfg.patches + 1, d)}
        encoder = {
            "registers": vectors(each, d), "rounds": vectors(self.count, each, d), "hidden": vectors(d),
            "again_norm": vit.norm_spec(d),
        }  # fmt: skip
        return {"encoder": both | encoder, "decoder": both}

    def labels(self, cfg: Any) -> list[str]:
        each = cfg.registers // self.count
        return [str(each * (i + 1)) for i in range(self.count)]

    def passes(self, cfg: Any) -> tuple[float, float]:
        return float(self.count), float(self.count)

    def train(self, p: Tree, x_bpc: jax.Array, key: jax.Array, cfg: Any) -> Trained:
        keys = jax.random.split(key, self.count)

        def step(x_btd: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
            i, key = inputs
            one = next_round(p, x_btd, i, cfg)
            good_bp = self.settled(x_bpc, one.patches)
            hide = jax.random.bernoulli(key, jax.lax.stop_gradient(good_bp)) & (good_bp >= self.halt)
            error = jnp.mean(jnp.square(one.patches - x_bpc))
            return hidden(p, one.x, hide), (one.patches, error, one.found.loss_of(one.keep))

        inputs = jnp.arange(self.count), keys
        _, (patches_nbpc, error_n, loss_n) = jax.lax.scan(step, begin(p, x_bpc, cfg), inputs)
        weights = [self.weights[min(i, len(self.weights) - 1)] for i in range(self.count)]
        loss = jnp.sum(jnp.array(weights) * error_n + loss_n)
        return Trained(patches_nbpc[-1], loss, {"tokens": jnp.float32(cfg.registers)})

    def choices(self, p: Tree, x_bpc: jax.Array, cfg: Any) -> Choices:
        def step(x_btd: jax.Array, i: jax.Array) -> tuple[jax.Array, Choices]:
            one = next_round(p, x_btd, i, cfg)
            index = None if one.found.index is None else jnp.where(one.keep, one.found.index, -1)
            tokens = jnp.sum(one.keep, axis=-1, dtype=jnp.int32)
            x_btd = hidden(p, one.x, self.settled(x_bpc, one.patches) >= self.halt)
            return x_btd, Choices(tokens, one.patches, index)

        return jax.lax.scan(step, begin(p, x_bpc, cfg), jnp.arange(self.count))[1]

    def settled(self, x_bpc: jax.Array, out_bpc: jax.Array) -> jax.Array:
        """f32 [b, p]: p of every patch, see above."""
        return jnp.exp(-jnp.mean(jnp.square(out_bpc - x_bpc), axis=-1) / self.scale)


def begin(p: Tree, x_bpc: jax.Array, cfg: Any) -> jax.Array:
    """The class token, the patches as vectors of length one before their places are added, and room for all rounds'
    registers: [b, t, d]."""
    e = p["encoder"]
    x_bpd = unit(vit.affine(e["patch"], x_bpc.astype(cfg.dtype)))
    first = jnp.broadcast_to(e["class"].astype(x_bpd.dtype), (len(x_bpd), 1, x_bpd.shape[2]))
    x_btd = jnp.concatenate([first, x_bpd], axis=1)
    x_btd = x_btd + jnp.broadcast_to(e["positions"].astype(x_btd.dtype), x_btd.shape)
    return jnp.pad(x_btd, [(0, 0), (0, e["rounds"].shape[0] * e["registers"].shape[0]), (0, 0)])


def next_round(p: Tree, x_btd: jax.Array, i: jax.Array, cfg: Any) -> Round:
    """Round i (i32 [], from 0): its registers are added, and all is encoded and decoded. x_btd: of `begin`, or of the
    round before."""
    e = p["encoder"]
    count, each, d = e["rounds"].shape
    front, b = x_btd.shape[1] - count * each, len(x_btd)
    new = (e["registers"] + e["rounds"][i]).astype(x_btd.dtype)
    new = jnp.broadcast_to(new[None], (b, each, d))
    x_btd = jax.lax.dynamic_update_slice(x_btd, new, (0, front + i * each, 0))
    norm = jax.tree.map(lambda first, again: jnp.where(i == 0, first, again), e["first_norm"], e["again_norm"])
    keep_br = jnp.broadcast_to((jnp.arange(count * each) < (i + 1) * each)[None], (b, count * each))
    tokens = forward.places(front, keep_br.shape, keep_br, causal=False)
    x_btd = vit.blocks(e["blocks"], vit.norm(norm, x_btd, cfg.norm_eps), tokens, cfg.norm_eps)
    found = forward.quantise(p, forward.latents(p, x_btd[:, front:], cfg), cfg)
    return Round(x_btd, found, keep_br, forward.decode(p, found.z, keep_br, cfg))


def hidden(p: Tree, x_btd: jax.Array, hide_bp: jax.Array) -> jax.Array:
    """The encoder's vectors after a round, in which patches (bool [b, p]) are masks in their places."""
    e, n = p["encoder"], hide_bp.shape[1]
    masks = (e["positions"][1:] + jnp.broadcast_to(e["hidden"], (n, x_btd.shape[2]))).astype(x_btd.dtype)
    patches = x_btd[:, 1 : n + 1]
    masks, hide = jnp.broadcast_to(masks[None], patches.shape), jnp.broadcast_to(hide_bp[..., None], patches.shape)
    return x_btd.at[:, 1 : n + 1].set(jnp.where(hide, masks, patches))
