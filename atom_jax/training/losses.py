"""Next-token cross-entropy, as sums over targets, in memory that does not grow with the vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.models import registry
from atom_jax.sharding import constrain, length_shards
from atom_jax.typing import Batch
from atom_jax.units import late_loss

# Logits per device above which they are computed block by block: 128 MiB in float32.
BLOCK_LOGITS = 2**25


@struct.dataclass
class Sums:
    """Totals over the targets that count, so that parts of a batch add up exactly.

    objective: f32 [], what is minimised once divided by the number of targets: nats plus penalties.
    nats:      f32 [], cross-entropy.
    tokens:    i32 [], targets that count.
    bytes:     i32 [], UTF-8 bytes that these targets stand for.
    learned:   name -> f32 [2], a sum and what it is to be divided by: what the model reports about itself.
    """

    objective: jax.Array
    nats: jax.Array
    tokens: jax.Array
    bytes: jax.Array
    learned: dict[str, jax.Array] = struct.field(default_factory=dict)


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
    step: jax.Array | None = None,
    *,
    cfg: Any,
    lengths: np.ndarray,
    z_loss: float = 0.0,
    block: int | None = None,
) -> Sums:
    """Cross-entropy of `batch.targets` where `batch.loss_mask`, plus z_loss * log(Z)^2 and the model's own losses
    (`aux["loss"]`, a mean) per target.

    Args:
      key: PRNG key for models that draw while they train; None: no noise. step: not used here.
      lengths: i32 [v], bytes per token id.
      block: positions per block of logits; None chooses one block when [b, t, v] is small.
    """
    model = registry.of(cfg)
    x_btd, _, aux = model.hidden(params, batch, cfg=cfg, key=key)
    b, t, _ = x_btd.shape
    mask = batch.loss_mask.astype(jnp.float32)
    goals = model.codec(cfg).fuse(batch.targets, aux)

    late, tables = aux.get("late"), gathered(params)

    def score(x: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        logits = model.logits(tables, x, cfg=cfg)
        return _score(logits, targets, mask), None if late is None else _entropy(logits)

    block = block or positions_per_block(b, t, cfg.vocab_size)
    if block >= t:
        (nats, z), entropy = score(x_btd, goals, mask)
    else:
        parts = [blocks(a, block) for a in (x_btd, goals, mask)]

        def step(total: jax.Array, part: Any) -> tuple[jax.Array, jax.Array | None]:
            sums, entropy = score(*part)
            return total + sums, entropy

        start = jnp.zeros(2, jnp.float32)
        (nats, z), entropy = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), start, tuple(parts))
        entropy = None if entropy is None else jnp.moveaxis(entropy, 0, 1).reshape(b, -1)[:, :t]
    own = aux.get("loss", 0.0) + (0.0 if late is None else late_loss(aux, entropy, batch, cfg.chunking))
    count = jnp.sum(mask > 0, dtype=jnp.int32)
    return Sums(
        objective=nats + z_loss * z + own * count,
        nats=nats,
        tokens=count,
        bytes=counted_bytes(lengths, batch),
        learned=aux.get("metrics", {}),
    )


def counted_bytes(lengths: np.ndarray, batch: Batch) -> jax.Array:
    """UTF-8 bytes of the targets that count, i32 []; lengths: i32 [v], bytes per token id."""
    return jnp.sum(jnp.take(jnp.asarray(lengths), batch.targets, axis=0) * (batch.loss_mask > 0), dtype=jnp.int32)


def _entropy(logits_btv: jax.Array) -> jax.Array:
    """Entropy of the next token, float32 [b, t], in nats."""
    logp = jax.nn.log_softmax(logits_btv, axis=-1)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def _score(logits_btv: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """f32 [2]: sums of the cross-entropy and of log(Z)^2."""
    log_z = jax.nn.logsumexp(logits_btv, axis=-1)
    # A comparison instead of a gather: it stays local when the vocabulary is sharded, and so does its gradient.
    here = jax.lax.broadcasted_iota(jnp.int32, logits_btv.shape, 2) == targets[..., None]
    chosen = jnp.sum(jnp.where(here, logits_btv, 0.0), axis=-1)
    return jnp.stack([jnp.sum((log_z - chosen) * mask), jnp.sum(jnp.square(log_z) * mask)])


def positions_per_block(b: int, t: int, v: int) -> int:
    """Positions whose logits fit the limit."""
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    return t if b * t * v <= BLOCK_LOGITS * devices else max(BLOCK_LOGITS * devices // (b * v), 1)


def gathered(params: Any) -> Any:
    """`params`, with tables of the vocabulary gathered along the width here, once for all blocks of logits."""
    axes = {"embed": ("vocab", None), "unembed": (None, "vocab")}
    return {k: constrain(p, *axes[k]) if k in axes else p for k, p in params.items()}


def blocks(x: jax.Array, block: int) -> jax.Array:
    """[b, t, ...] to [n, b, block, ...], padded with zeros. Where the positions of a row are spread over devices,
    every block has some from each of them."""
    b, t = x.shape[:2]
    shards = length_shards(t)
    block = max(block // shards, 1)
    x = x.reshape(b, shards, t // shards, *x.shape[2:])
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % block)] + [(0, 0)] * (x.ndim - 3))
    x = jnp.moveaxis(x.reshape(b, shards, -1, block, *x.shape[3:]), 2, 0)
    x = x.reshape(-1, b, shards * block, *x.shape[4:])
    return constrain(x, None, "batch", "length", *[None] * (x.ndim - 3))
