"""Tokens that say themselves which of them are needed: KARL (Duggal et al., 2025, "Single-pass Adaptive Image
Tokenization for Minimum Program Search").

Letters: those of `forward`; n bins of errors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import config
from atom_jax.models.image_tokens import forward
from atom_jax.models.image_tokens.lengths import Choices, Length, Trained, first
from atom_jax.models.image_tokens.quantise import Quantised
from atom_jax.nn import vit
from atom_jax.params import ParamSpec, Tree, normal
from atom_jax.typing import AtomError

BINS = (
    0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.09, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.24, 0.28, 0.32, 0.38
)  # fmt: skip


@struct.dataclass
class Pass:
    """One pass: halt f32 [b, r], the log-odds that a register is not needed; keep bool [b, r]; found: codes; patches
    f32 [b, p, c] decoded from those that are kept."""

    halt: jax.Array
    keep: jax.Array
    found: Quantised
    patches: jax.Array


@config.register
@dataclasses.dataclass(frozen=True)
class Halting(Length):
    """The encoder is told the mean absolute error that is allowed, and every register says whether it halts.

    Training takes two passes: one with T registers and an error in the first bins, whose registers are all needed;
    one with all registers and the error that the first one had, of which T are needed and the others are not.

    bins: errors that the encoder knows, rising; another one counts as the next larger. start: bins of the first pass
    are at most that, each as likely. (In the code a bin gets rarer whenever a batch's best error is below it; a run
    would have to keep that.) step: T is a multiple of it, up to all registers, drawn for each image; the code goes
    beyond all, where nothing can halt. halt: registers with a larger probability do. tail: those before the last one
    that doesn't, don't.
    """

    bins: tuple[float, ...] = BINS
    start: float = 0.04
    step: int = 1
    hidden: int = 512
    halt: float = 0.75
    tail: bool = False

    def __post_init__(self):
        config.check(self, bins=(0, 1e6), start=(0, 1e6), step=(1, 2**16), hidden=(1, 2**20), halt=(0, 1))
        if list(self.bins) != sorted(set(self.bins)) or not self.bins or self.bins[0] > self.start:
            raise AtomError(f"bins: expected rising errors, of which the first is at most start {self.start:g}")

    def check(self, cfg: Any) -> None:
        if self.step > cfg.registers:
            raise AtomError(f"length.step: there are only {cfg.registers} registers, got {self.step}")
        if cfg.mask != "full":
            raise AtomError("mask: registers that halt need full")

    def spec(self, cfg: Any) -> dict[str, Tree]:
        d = cfg.d_model

        def errors(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jnp.broadcast_to(jnp.array(self.bins, dtype)[:, None], shape) + normal(0.02)(key, shape, dtype)

        halt = {"up": vit.affine_spec(d, self.hidden), "down": vit.affine_spec(self.hidden, 1)}
        bins = ParamSpec((len(self.bins), d), (None, "embed"), errors)
        return {"encoder": {"bins": bins, "halt_norm": vit.norm_spec(d), "halt": halt}}

    def labels(self, cfg: Any) -> list[str]:
        return [f"bound {bin:g}" for bin in reversed(self.bins)]

    def passes(self, cfg: Any) -> tuple[float, float]:
        return 2.0, 2.0

    def train(self, p: Tree, x_bpc: jax.Array, key: jax.Array, cfg: Any) -> Trained:
        b, r = len(x_bpc), cfg.registers
        for_bin, for_count = jax.random.split(key)
        bins = jax.random.randint(for_bin, (b,), 0, int(np.searchsorted(self.bins, self.start, side="right")))
        count_b = self.step * jax.random.randint(for_count, (b,), 1, r // self.step + 1)
        needed = first(count_b, r)
        one = self.once(p, x_bpc, bins, cfg, needed, halts=False)
        error_b = jax.lax.stop_gradient(jnp.mean(jnp.abs(one.patches - x_bpc), axis=(1, 2)))
        two = self.once(p, x_bpc, self.bin_of(error_b), cfg)
        loss = jnp.float32(0)
        for each, exists in ((one, needed), (two, jnp.ones_like(needed))):
            loss += jnp.mean(jnp.square(each.patches - x_bpc)) + each.found.loss_of(exists)
            # Of those that are needed the log-odds should be low, of the others high.
            loss += mean_of(jax.nn.softplus(each.halt), needed) + mean_of(
                jax.nn.softplus(-each.halt), exists & ~needed
            )
        tokens = jnp.mean(jnp.sum(two.keep, axis=-1, dtype=jnp.float32))
        return Trained(two.patches, loss, {"tokens": tokens})

    def choices(self, p: Tree, x_bpc: jax.Array, cfg: Any) -> Choices:
        def step(_: None, i: jax.Array) -> tuple[None, Choices]:
            one = self.once(p, x_bpc, jnp.full(len(x_bpc), i), cfg)
            index = None if one.found.index is None else jnp.where(one.keep, one.found.index, -1)
            return None, Choices(jnp.sum(one.keep, axis=-1, dtype=jnp.int32), one.patches, index)

        return jax.lax.scan(step, None, jnp.arange(len(self.bins))[::-1])[1]

    def bin_of(self, error_b: jax.Array) -> jax.Array:
        """i32 [b]: the bins of errors, the smallest that is at least as large, or the last."""
        return jnp.minimum(jnp.searchsorted(jnp.array(self.bins), error_b), len(self.bins) - 1)

    def kept(self, halt_br: jax.Array) -> jax.Array:
        """bool [b, r]: registers that do not halt, by the log-odds that they do."""
        keep_br = jax.nn.sigmoid(halt_br) <= self.halt
        return jax.lax.cummax(keep_br.astype(jnp.int32), axis=1, reverse=True) > 0 if self.tail else keep_br

    def once(
        self,
        p: Tree,
        x_bpc: jax.Array,
        bin_b: jax.Array,
        cfg: Any,
        exists_br: jax.Array | None = None,
        halts: bool = True,
    ) -> Pass:
        """One pass with the errors of these bins (i32 [b]). exists_br: bool, registers that there are, None: all.
        halts: those that say so are left out."""
        e = p["encoder"]
        x_brd = forward.states(p, x_bpc, cfg, exists_br, jnp.take(e["bins"], bin_b, axis=0))
        hidden = jnp.tanh(vit.affine(e["halt"]["up"], vit.norm(e["halt_norm"], x_brd, cfg.norm_eps)))
        halt_br = vit.affine(e["halt"]["down"], hidden)[..., 0].astype(jnp.float32)
        keep_br = self.kept(halt_br) if halts else jnp.ones(halt_br.shape, bool)
        keep_br = keep_br if exists_br is None else keep_br & exists_br
        found = forward.quantise(p, forward.latents(p, x_brd, cfg), cfg)
        return Pass(halt_br, keep_br, found, forward.decode(p, found.z, keep_br, cfg))


def mean_of(x_br: jax.Array, which_br: jax.Array) -> jax.Array:
    """f32 []: the mean of some of the numbers, 0 of none."""
    return jnp.sum(x_br * which_br) / jnp.maximum(jnp.sum(which_br), 1)
