"""Making a Bolmo of a subword model (Minixhofer et al., 2025, "Bolmo", section 4): the losses of both stages.

Stage 1 teaches encoder, boundary predictor, decoder and head what the source model does, whose layers are frozen;
stage 2 trains everything on text. Dimension letters besides those of `atom_jax.typing`: k subword tokens of a row,
m patches.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import config, units
from atom_jax.chunking.config import slots_for
from atom_jax.chunking.rules import lookahead
from atom_jax.chunking.segments import gather, segment_sum
from atom_jax.chunking.types import Boundary, Plan, Seen
from atom_jax.models import bolmo, transformer
from atom_jax.models.bolmo import BolmoConfig, forward
from atom_jax.models.bolmo.config import FUSED
from atom_jax.nn import scoring
from atom_jax.nn.attention import Tokens
from atom_jax.nn.embedding import lookup
from atom_jax.nn.norm import rms_norm
from atom_jax.params import Tree
from atom_jax.tokenizers.suffix import SPECIALS
from atom_jax.typing import Batch
from atom_jax.units import Parts, Place

# Symbols after which a patch is sure to have ended, for the correction that the published script makes.
SPACES = tuple(b + SPECIALS for b in b" \t\n")


@struct.dataclass
class Lesson:
    """Texts as bytes and as subwords.

    bytes: Batch of a bos and the bytes of all tokens of a row but the last, one document per row; its `targets` are
    the next ids, its `loss_mask` is True where there is one.
    tokens: i32 [b, k] source tokens. lengths: i32 [b, k] bytes of each patch: 1 for the bos, then those of all tokens
    but the last; 0 where there is no room for them. Patch i follows tokens before i.
    """

    bytes: Batch
    tokens: jax.Array
    lengths: jax.Array

    @property
    def loss_mask(self) -> jax.Array:
        """bool [b, t]: bytes that have a next one."""
        return self.bytes.loss_mask

    @property
    def owner(self) -> jax.Array:
        """i32 [b, t + 1]: the patch that each byte belongs to, k beyond the last."""
        ends, t = jnp.cumsum(self.lengths, axis=1), self.bytes.ids.shape[1]
        return jax.vmap(lambda e: jnp.searchsorted(e, jnp.arange(t + 1), side="right"))(ends).astype(jnp.int32)

    @property
    def marks(self) -> jax.Array:
        """bool [b, t]: where patches end. A bos inside a row joins the patch before it."""
        owner, ids = self.owner, self.bytes.ids
        before_bos = jnp.pad(ids[:, 1:] % FUSED == 1, ((0, 0), (0, 1)))
        ends = (owner[:, 1:] != owner[:, :-1]) & ~before_bos
        return ends.at[:, 0].set(True) & (self.bytes.segments > 0)


@struct.dataclass
class Weights:
    """Factors of the losses, the published ones by default: encoder (the paper writes 1), cross-entropy, decoder,
    boundaries."""

    encoder: float = 4.0
    cross_entropy: float = 1.0
    decoder: float = 1.0
    boundary: float = 4.0


@dataclasses.dataclass(frozen=True)
class Stage1:
    """How the source model is imitated.

    depth: layers after which patches and source tokens are compared. tau, epsilon: temperature of the decoder's loss,
    and the distance that it keeps from certainty.
    spaces: source tokens that begin with white space. Where there are any, both sides of the decoder's loss include
    that one of them (or of three bytes) comes next: the published script does so, though it serves no end when ids
    say where patches end.
    official_means: as in the published code, cross-entropy and decoder's loss are divided by the share of positions
    that count, once too often; else all losses are means over what counts.
    """

    depth: int = 4
    tau: float = 5.0
    epsilon: float = 1e-6
    spaces: tuple[int, ...] = ()
    official_means: bool = False

    def __post_init__(self):
        config.check(self, depth=(1, 10_000), tau=(1e-6, 1e6), epsilon=(0, 1), spaces=(0, 2**28))


def stage1(
    p: Tree, source: Tree, lesson: Lesson, weights: Weights, *, cfg: BolmoConfig, how: Stage1, eos: int
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """The loss of stage 1, f32 [], and its parts before weighting, by name, with "boundary_accuracy".

    Layers over patches have no gradients, but let them through. The decoder reads the source model's states in place
    of its own patches, at the source's boundaries.

    Args:
      p: parameters of the Bolmo, whose "main" are the layers of the source model. source: the latter's "embed",
        "norm" and "unembed" (without it, the embedding transposed). eos: the source token that begins every row.
      cfg: with room for all patches. Raises AtomError where suffix subwords are missing.
    """
    batch, tokens = lesson.bytes, Tokens(lesson.bytes.positions, lesson.bytes.segments)
    main = jax.lax.stop_gradient(p["main"])
    early_btd, late_btd = _source_states(main, source, lesson.tokens, eos, cfg, how.depth)

    stage, h_btd = forward.stage(p, cfg), forward.encode(p, batch, cfg)
    marks, owner = lesson.marks, lesson.owner[:, :-1]
    seen, given = Seen(h_btd, tokens, batch.ids, marks), Boundary(marks)
    boundary, _ = lookahead.apply(p["rule"], seen, (), cfg=lookahead.Lookahead(weight=1.0))
    parts = Parts.empty(stage.chunking, stage.d, len(marks), stage.dtype)
    plan, u_bm1d, _ = units.find(stage, seen, given, parts)
    at_bm = jnp.minimum(gather(owner, plan.at), lesson.tokens.shape[1] - 1)
    pooled_bmd = forward.linear(p["pool"], u_bm1d[:, :, 0])
    encoder = _encoder_loss(main, pooled_bmd, gather(early_btd, at_bm), plan, cfg, how.depth)

    patches = rms_norm(gather(late_btd, at_bm).astype(h_btd.dtype), p["patch_norm"], cfg.edge_eps)
    y_btd, _ = units.spread(stage, patches[:, :, None], h_btd, given, plan, parts.newest)
    x_btd, *_ = stage.decode(y_btd, None, Place(tokens))
    targets = bolmo.codec(cfg).fuse(batch.targets, {"boundaries": (_known(marks, batch),)})
    want, head = ("nats", "among") if how.spaces else ("nats",), functools.partial(bolmo.logits, p, cfg=cfg)
    ours = scoring.score(head, x_btd, targets, want, among=SPACES)
    chosen_bt = jnp.where(batch.loss_mask, -ours["nats"], 0.0)
    filled = jnp.mean(batch.loss_mask.astype(jnp.float32)) if how.official_means else 1.0
    cross_entropy = -jnp.sum(chosen_bt) / jnp.sum(batch.loss_mask) / filled

    theirs = scoring.score(_source_head(source, cfg), late_btd, lesson.tokens, want, among=how.spaces)
    student_bk = segment_sum(chosen_bt, lesson.owner[:, 1:], lesson.tokens.shape[1] + 1)[:, 1:-1]
    source_bk = -theirs["nats"][:, :-1]
    if how.spaces:
        ends = jnp.maximum(jnp.cumsum(lesson.lengths, axis=1)[:, 1:] - 1, 0)
        student_bk, source_bk = student_bk + gather(ours["among"], ends), source_bk + theirs["among"][:, 1:]
    kl_bk = binary_divergence(source_bk / how.tau - how.epsilon, student_bk / how.tau - how.epsilon)
    counts = lesson.lengths[:, 1:] > 0
    total = counts.size * filled if how.official_means else jnp.sum(counts)
    decoder = jnp.sum(jnp.where(counts, kl_bk, 0.0)) / total

    parts = {"encoder": encoder, "cross_entropy": cross_entropy, "decoder": decoder, "boundary": boundary.loss}
    loss = sum(getattr(weights, name) * value for name, value in parts.items())
    return loss, parts | {"boundary_accuracy": accuracy(boundary.mark, marks, batch)}


def stage2(
    p: Tree, batch: Batch, *, cfg: BolmoConfig, official_means: bool = False
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of stage 2, f32 []: cross-entropy, of ids that end patches where the model's own predictor says so,
    plus the predictor's own loss (`cfg.rule.weight`); and both by name.

    batch: with targets, loss_mask and marks, where patches are to end (`Lesson.marks`). cfg: the published code has
    room for as many patches as there are subword tokens; bytes beyond read the last one.
    """
    x_btd, _, aux = bolmo.hidden(p, batch, cfg=cfg)
    head = functools.partial(bolmo.logits, p, cfg=cfg)
    nats_bt = scoring.score(head, x_btd, bolmo.codec(cfg).fuse(batch.targets, aux))["nats"]
    loss = jnp.sum(jnp.where(batch.loss_mask, nats_bt, 0.0)) / jnp.sum(batch.loss_mask)
    if official_means:
        loss = loss / jnp.mean(batch.loss_mask.astype(jnp.float32))
    marks = batch.marks | (batch.positions == 0)
    boundary = lookahead.cross_entropy(aux["boundary_probs"][0], marks, batch.loss_mask)
    return loss + cfg.rule.weight * boundary, {"cross_entropy": loss, "boundary": boundary}


def counts(lesson: Lesson, cfg: BolmoConfig) -> dict[str, jax.Array]:
    """What the losses of both stages are means over, f32 [] by name: bytes that have a next one, source tokens, and
    patches for which there is room."""
    room = slots_for(lesson.bytes.ids.shape[1], cfg.capacity)
    patches = jnp.sum(jnp.minimum(jnp.sum(lesson.marks, axis=1), room), dtype=jnp.float32)
    sized = jnp.sum(lesson.lengths[:, 1:] > 0, dtype=jnp.float32)
    targets = jnp.sum(lesson.loss_mask, dtype=jnp.float32)
    return {"encoder": patches, "cross_entropy": targets, "decoder": sized, "boundary": targets}


def accuracy(mark_bt: jax.Array, marks_bt: jax.Array, batch: Batch) -> jax.Array:
    """Share of bytes, f32 [], on which the predictor and the marks agree, of those on which it decides: not the first
    and the last of a row."""
    counts = batch.loss_mask & (batch.positions > 0)
    return jnp.sum(counts & (mark_bt == marks_bt)) / jnp.maximum(jnp.sum(counts), 1)


def binary_divergence(a: jax.Array, b: jax.Array) -> jax.Array:
    """KL divergence of two coins whose heads have log-probabilities a and b, both below 0."""
    tails_a, tails_b = log1mexp(a), log1mexp(b)
    return jnp.exp(a) * (a - b) + (1 - jnp.exp(a)) * (tails_a - tails_b)


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0, also near 0 and far from it, with finite gradients."""
    near = x > -0.6931472
    return jnp.where(
        near, jnp.log(-jnp.expm1(jnp.where(near, x, -0.5))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    )


def _known(marks: jax.Array, batch: Batch) -> jax.Array:
    """Marks of bytes that have a next one: of the last byte of a row the predictor doesn't know."""
    return marks & batch.loss_mask


def _layers(main: Any, cfg: BolmoConfig, first: int, end: int) -> tuple[Any, transformer.TransformerConfig]:
    """Some of the layers over patches, and their configuration."""
    kinds = cfg.main.layer_types[first:end]
    return jax.tree.map(lambda x: x[first:end], main), dataclasses.replace(
        cfg.blocks, n_layers=end - first, layer_types=kinds
    )


def _source_states(
    main: Any, source: Tree, tokens_bk: jax.Array, eos: int, cfg: BolmoConfig, depth: int
) -> tuple[jax.Array, jax.Array]:
    """States [b, k, d] of the source model after `depth` layers and after all, without its final norm."""
    ids = jnp.pad(tokens_bk[:, :-1], ((0, 0), (1, 0)), constant_values=eos)
    x = lookup(jax.lax.stop_gradient(source["embed"]), ids, cfg.dtype)
    places = Tokens(jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape), jnp.ones_like(ids))
    out = []
    for first, end in ((0, depth), (depth, cfg.main.n_layers)):
        if first < end:
            layers, part = _layers(main, cfg, first, end)
            x, _, _ = transformer.blocks(layers, x, places, cfg=part)
        out.append(x)
    return out[0], out[1]


def _encoder_loss(
    main: Any, pooled_bmd: jax.Array, target_bmd: jax.Array, plan: Plan, cfg: BolmoConfig, depth: int
) -> jax.Array:
    """Mean distance of patches from the source's states after the same layers, over the square root of the width."""
    layers, part = _layers(main, cfg, 0, depth)
    x_bmd, _, _ = transformer.blocks(layers, pooled_bmd, plan.tokens, cfg=part)
    square = jnp.mean(jnp.square(x_bmd.astype(jnp.float32) - target_bmd.astype(jnp.float32)), axis=-1)
    used = plan.tokens.segments > 0
    distance = jnp.sqrt(jnp.where(used, jnp.maximum(square, 1e-20), 1.0))
    return jnp.sum(jnp.where(used, distance, 0.0)) / jnp.sum(used)


def _source_head(source: Tree, cfg: BolmoConfig) -> scoring.Head:
    """The source model's final norm and head."""
    source = jax.lax.stop_gradient(source)
    table = source["unembed"] if "unembed" in source else source["embed"].T

    def head(x_bkd: jax.Array) -> jax.Array:
        x_bkd = rms_norm(x_bkd, source["norm"], cfg.main.norm_eps)
        return jnp.dot(x_bkd, table.astype(x_bkd.dtype), preferred_element_type=jnp.float32)

    return head
