"""Next-token cross-entropy, as sums over targets."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.models import registry
from atom_jax.nn import scoring
from atom_jax.typing import Batch
from atom_jax.units import late_loss


@struct.dataclass
class Sums:
    """Totals over the targets that count, so that parts of a batch add up exactly.

    objective: f32 [], what is minimised once divided by the number of targets: nats plus penalties.
    nats:      f32 [], cross-entropy, or the squared error of targets that are no text.
    tokens:    i32 [], targets that count.
    bytes:     i32 [], UTF-8 bytes that these targets stand for, or None where they are no text.
    learned:   name -> f32 [2], a sum and what it is to be divided by: what the model reports about itself.
    """

    objective: jax.Array
    nats: jax.Array
    tokens: jax.Array
    bytes: jax.Array | None
    learned: dict[str, jax.Array] = struct.field(default_factory=dict)


def summary(sums: Sums) -> dict[str, jax.Array]:
    """The loss in nats per token, of text also in bits per byte, and what the model reports about itself."""
    found = {"loss": sums.nats / jnp.maximum(sums.tokens, 1)}
    if sums.bytes is not None:
        found["bits_per_byte"] = sums.nats / (math.log(2) * jnp.maximum(sums.bytes, 1))
    return found | {name: x[0] / jnp.maximum(x[1], 1e-9) for name, x in sums.learned.items()}


def byte_lengths(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """i32 [vocab_size]: UTF-8 bytes of each token id; 0 for specials and for ids past the tokenizer's own."""
    known = min(tokenizer.vocab_size, vocab_size)
    specials = {tokenizer.bos_id, tokenizer.pad_id, *tokenizer.eos_ids, *tokenizer.front}
    lengths = [0 if i in specials else len(tokenizer.decode_bytes([i])) for i in range(known)]
    return np.array(lengths + [0] * (vocab_size - known), np.int32)


def next_token(
    params: Any,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    cfg: Any,
    lengths: np.ndarray,
    z_loss: float = 0.0,
    focus: float = 0.0,
    per_target: jax.Array | None = None,
    block: int | None = None,
) -> Sums:
    """Cross-entropy of `batch.targets` where `batch.loss_mask`, plus z_loss * log(Z)^2 and the model's own losses
    (`aux["loss"]`, a mean over the batch) per target. Where there are `batch.loss_weights`, what is minimised of the
    cross-entropy is its mean over weights; `nats` are those of all targets alike.

    Args:
      key: PRNG key for models that draw while they train; None: no noise.
      focus: in the objective a target's cross-entropy counts (1 - p)^focus times, p its probability.
      per_target: `weight_per_target` of the batch that this one is a part of; None: of this one.
      lengths: i32 [v], bytes per token id.
      block: as in `scoring.score`.
    """
    model = registry.of(cfg)
    x_btd, _, aux = model.hidden(params, batch, cfg=cfg, key=key)
    mask = batch.loss_mask.astype(jnp.float32)
    goals = model.codec(cfg).fuse(batch.targets, aux)

    late, tables = aux.get("late"), scoring.gathered(params)
    head = functools.partial(model.logits, tables, cfg=cfg)
    want = ["nats", *["log_z"] * bool(z_loss), *["entropy"] * (late is not None)]
    found = scoring.score(head, x_btd, goals, want, block=block)
    nats = jnp.sum(found["nats"] * mask)
    weights = mask
    if batch.loss_weights is not None:
        weights = mask * batch.loss_weights / (weight_per_target(batch) if per_target is None else per_target)
    hard = jax.lax.stop_gradient(jnp.maximum(-jnp.expm1(-found["nats"]), 0.0)) ** focus if focus else 1.0
    penalty = z_loss * jnp.sum(jnp.square(found["log_z"]) * mask) if z_loss else 0.0
    own = aux.get("loss", 0.0) + (0.0 if late is None else late_loss(aux, found["entropy"], batch, cfg.chunking))
    count = jnp.sum(mask > 0, dtype=jnp.int32)
    return Sums(
        objective=jnp.sum(hard * found["nats"] * weights) + penalty + own * count,
        nats=nats,
        tokens=count,
        bytes=counted_bytes(lengths, batch),
        learned=aux.get("metrics", {}),
    )


def weight_per_target(batch: Batch) -> jax.Array:
    """The mean of `loss_weights` over the targets that count, f32 []."""
    return jnp.sum(batch.loss_weights * batch.loss_mask) / jnp.maximum(jnp.sum(batch.loss_mask), 1)


def counted_bytes(lengths: np.ndarray, batch: Batch) -> jax.Array:
    """UTF-8 bytes of the targets that count, i32 []; lengths: i32 [v], bytes per token id."""
    return jnp.sum(jnp.take(jnp.asarray(lengths), batch.targets, axis=0) * (batch.loss_mask > 0), dtype=jnp.int32)
