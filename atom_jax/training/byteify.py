"""Byteification as a training run: what is minimised, and how the result is judged (Minixhofer et al., 2025, "Bolmo:
Byteifying the Next Generation of Language Models", section 4)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.models import bolmo
from atom_jax.models.bolmo import BolmoConfig
from atom_jax.models.bolmo.config import FUSED
from atom_jax.models.transformer import TransformerConfig
from atom_jax.models.transformer import spec as source_spec
from atom_jax.params import Tree
from atom_jax.training.losses import Sums, counted_bytes, next_token
from atom_jax.transfer.byteify import Lesson, Stage1, Weights, accuracy, stage1, stage2
from atom_jax.typing import AtomError, Batch

# Tables of the source model that the first stage needs besides its layers.
TABLES = ("embed", "norm", "unembed")


@dataclasses.dataclass(frozen=True)
class ByteifyConfig:
    """source: the subword model that a Bolmo is made of, any checkpoint that `atom_jax.load` reads with a tokenizer.
    stage: 1 imitates it, while its layers are frozen (optim.groups: main, and the tables in source), and starts from
        it; 2 trains on its boundaries and on text, and starts from init_from.
    imitate, weights: of stage 1. spaces: whether imitate.spaces are the source's tokens that begin with white space.
    official_means: as in the published code, for stage 2 (for stage 1 see `Stage1`).
    """

    source: str = ""
    stage: int = 1
    imitate: Stage1 = dataclasses.field(default_factory=Stage1)
    weights: Weights = dataclasses.field(default_factory=Weights)
    spaces: bool = False
    official_means: bool = False

    def __post_init__(self):
        config.check(self)
        if self.stage not in (1, 2):
            raise AtomError(f"byteify.stage: expected 1 or 2, got {self.stage}")


def tables(main: TransformerConfig) -> Tree:
    """Specs of TABLES, as far as the source model has them."""
    spec = source_spec(main)
    return {name: spec[name] for name in TABLES if name in spec}


def with_spaces(how: ByteifyConfig, tokenizer: Any) -> ByteifyConfig:
    """`how`, with the tokens that `how.spaces` asks for."""
    if not how.spaces:
        return how
    found = tuple(i for i, piece in sorted(tokenizer.subwords.pieces.items()) if piece[:1] in (b" ", b"\n", b"\t"))
    return dataclasses.replace(how, imitate=dataclasses.replace(how.imitate, spaces=found))


def objective(
    params: Any,
    lesson: Lesson,
    key: jax.Array | None = None,
    step: jax.Array | None = None,
    *,
    cfg: BolmoConfig,
    lengths: np.ndarray,
    how: ByteifyConfig,
    eos: int,
) -> Sums:
    """What `how.stage` minimises; without a key (validation) nothing but the cross-entropy, with the model's own
    boundaries.

    Args:
      params: the Bolmo's, in stage 1 with the source's tables under "source". lengths: i32 [v], bytes per id.
      eos: the source's token that begins every row. key, step: not used otherwise.
    Returns: `losses.Sums` whose targets are bytes with whether they end a patch. learned: in training the parts of
    the loss before weighting and, of stage 1, boundary_accuracy; in validation boundary_accuracy, boundary_precision
    and boundary_recall, bytes_per_unit_0 (bytes per patch), lost_0 (patches without room, per byte) and bytes_alone
    (bits per byte where it does not count whether a byte ends a patch).
    """
    batch = lesson.bytes.replace(marks=lesson.marks)
    if key is None:
        return _judge(params, batch, cfg, lengths)
    if how.stage == 1:
        loss, parts = stage1(params, params["source"], lesson, how.weights, cfg=cfg, how=how.imitate, eos=eos)
    else:
        loss, parts = stage2(params, batch, cfg=cfg, official_means=how.official_means)
    count = jnp.sum(batch.loss_mask, dtype=jnp.int32)
    weight = count.astype(jnp.float32)
    return Sums(
        objective=loss * weight,
        nats=parts.pop("cross_entropy") * weight,
        tokens=count,
        bytes=counted_bytes(lengths, batch),
        learned={name: jnp.stack([value * weight, weight]) for name, value in parts.items()},
    )


def _judge(params: Any, batch: Batch, cfg: BolmoConfig, lengths: np.ndarray) -> Sums:
    x_btd, _, aux = bolmo.hidden(params, batch, cfg=cfg)
    logp_btv = jax.nn.log_softmax(bolmo.logits(params, x_btd, cfg=cfg))
    found, counts = aux["boundaries"][0], batch.loss_mask

    def total(x_bt: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(counts, x_bt, 0.0), dtype=jnp.float32)

    def pick(targets_bt: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logp_btv, targets_bt[..., None], axis=-1)[..., 0]

    plain = batch.targets % FUSED
    alone = jnp.logaddexp(pick(plain), pick(plain + FUSED))
    decided = batch.positions > 0
    both, ours, theirs = (total(m & decided) for m in (found & batch.marks, found, batch.marks))
    size, count = counted_bytes(lengths, batch).astype(jnp.float32), jnp.sum(counts, dtype=jnp.int32)
    agree = accuracy(found, batch.marks, batch)
    nats = -total(pick(bolmo.codec(cfg).fuse(batch.targets, aux)))
    return Sums(
        objective=nats,
        nats=nats,
        tokens=count,
        bytes=counted_bytes(lengths, batch),
        learned={
            "bytes_alone": jnp.stack([-total(alone) / math.log(2), size]),
            "boundary_accuracy": jnp.stack([agree * count, count.astype(jnp.float32)]),
            "boundary_precision": jnp.stack([both, ours]),
            "boundary_recall": jnp.stack([both, theirs]),
            "bytes_per_unit_0": aux["metrics"]["bytes_per_unit_0"],
            "lost_0": jnp.stack([aux["lost"].astype(jnp.float32), count.astype(jnp.float32)]),
        },
    )


def source_sums(params: Any, lesson: Lesson, *, cfg: TransformerConfig, lengths: np.ndarray, eos: int) -> Sums:
    """Cross-entropy of the source model, with parameters of its own, on the text of a lesson. lengths: i32 [v], bytes
    per token."""
    tokens = lesson.tokens
    ids = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=eos)
    at = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    counts = jnp.pad(lesson.lengths[:, 1:] > 0, ((0, 0), (0, 1)))
    return next_token(params, Batch(ids, at, jnp.ones_like(ids), tokens, counts), cfg=cfg, lengths=lengths)
