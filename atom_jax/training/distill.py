"""Retrofitting learned evictors: a model with eviction is trained towards itself without (Łańcucki et al., 2025)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.kvcache.dms import decide
from atom_jax.kvcache.dms.decide import Mode
from atom_jax.models import transformer
from atom_jax.training.losses import Sums, blocks, counted_bytes, gathered, positions_per_block
from atom_jax.typing import AtomError, Batch


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """direction: "reverse", KL(student || teacher), as in the released code; "forward", KL(teacher || student); or
        "both", their mean.
    cr_start, cr_end, cr_steps: the compression ratio CR rises linearly over so many steps; a share 1 - 1/CR of all
        decisions should evict, and what is missing from it is added to the loss, `weight` times.
    fade_steps: of the borrowed form: steps over which the borrowed channel leaves attention, before anything is
        evicted.
    remat: compute the layers again in the backward pass instead of keeping their activations.
    """

    direction: str = "reverse"
    cr_start: float = 1.0
    cr_end: float = 8.0
    cr_steps: int = 238
    weight: float = 1.0
    fade_steps: int = 0
    remat: bool = True

    def __post_init__(self):
        config.check(self)
        if self.direction not in ("reverse", "forward", "both"):
            raise AtomError(f"distill.direction: expected reverse, forward or both, got {self.direction!r}")
        if min(self.cr_start, self.cr_end) < 1 or self.cr_steps < 1 or self.fade_steps < 0:
            raise AtomError(
                "distill: cr_start and cr_end must be at least 1, cr_steps positive, fade_steps not negative"
            )

    def target(self, step: Any) -> jax.Array:
        """The share of decisions that should evict at a step, f32 []."""
        progress = jnp.clip((step - self.fade_steps) / self.cr_steps, 0.0, 1.0)
        return 1.0 - 1.0 / (self.cr_start + (self.cr_end - self.cr_start) * progress)


def self_distillation(
    params: Any,
    batch: Batch,
    key: jax.Array | None = None,
    step: jax.Array | None = None,
    *,
    cfg: transformer.TransformerConfig,
    lengths: np.ndarray,
    how: DistillConfig,
    block: int | None = None,
) -> Sums:
    """Divergence from the same weights without eviction, plus the missing share of evictions.

    With a key, decisions are relaxed and drawn; without (validation), they are hard, and no share is demanded. The
    rest as for `losses.next_token`; positions whose input ends a text do not count in the divergence. `learned`: kl
    (nats per token), agreement (share of tokens where both think the same token likeliest), evicted (share of
    decisions), held (entries per head at the end of a row).
    """
    b, t = batch.ids.shape
    fade, before = None, 0.0
    if how.fade_steps and step is not None:
        fade = jnp.clip(1.0 - step / how.fade_steps, 0.0, 1.0)
        before = jnp.where(step < how.fade_steps, -1e9, 0.0)
    student_mode, teacher_mode = Mode("hard", fade=fade), Mode("off")
    if fade is not None:
        teacher_mode = Mode("off", fade=jnp.where(step < how.fade_steps, 1.0, 0.0))
    if key is not None:
        noise = decide.logistic(key, (cfg.n_layers, b, cfg.n_kv_heads, t)) + before
        student_mode = Mode("relaxed", noise, fade)
    frozen = jax.lax.stop_gradient(params)
    teacher, _, _ = transformer.hidden(frozen, batch, cfg=cfg, mode=teacher_mode)
    student, _, aux = transformer.hidden(
        params, batch, cfg=dataclasses.replace(cfg, remat=how.remat), mode=student_mode
    )
    ends = jnp.isin(batch.ids, jnp.array(cfg.eos_ids or (-1,)))
    counts = batch.loss_mask.astype(jnp.float32)
    block = block or positions_per_block(b, t, cfg.vocab_size)
    parts = [
        blocks(x, block) for x in (student, jax.lax.stop_gradient(teacher), batch.targets, counts, counts * ~ends)
    ]

    student_tables, teacher_tables = gathered(params), gathered(frozen)

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        x, y, targets, counts, weights = part
        s = jax.nn.log_softmax(transformer.logits(student_tables, x, cfg=cfg))
        u = jax.nn.log_softmax(transformer.logits(teacher_tables, y, cfg=cfg))
        kl = divergence(s, u, how.direction)
        chosen = jnp.take_along_axis(s, targets[..., None], axis=-1)[..., 0]
        agree = (jnp.argmax(s, -1) == jnp.argmax(u, -1)).astype(jnp.float32)
        new = (jnp.sum(kl * weights), jnp.sum(weights), jnp.sum(agree * weights), -jnp.sum(chosen * counts))
        return total + jnp.stack(new), None

    zero = jnp.zeros(4, jnp.float32)
    kl, weight, agree, nats = jax.lax.scan(jax.checkpoint(add, prevent_cse=False), zero, tuple(parts))[0]
    count = jnp.sum(counts > 0, dtype=jnp.int32)
    real = (batch.segments > 0)[None, :, None].astype(jnp.float32)
    share_b = jnp.sum(aux["evict_soft"] * real, (0, 2, 3)) / jnp.maximum(
        jnp.sum(real, (0, 2, 3)) * cfg.n_layers * cfg.n_kv_heads, 1.0
    )
    missing = 0.0
    if key is not None and step is not None:
        missing = how.weight * jnp.mean(jnp.maximum(how.target(step) - share_b, 0.0))
    held = jnp.mean(aux["occupancy"].astype(jnp.float32))
    return Sums(
        objective=(kl / jnp.maximum(weight, 1.0) + missing) * count,
        nats=nats,
        tokens=count,
        bytes=counted_bytes(lengths, batch),
        learned={
            "kl": jnp.stack([kl, weight]),
            "agreement": jnp.stack([agree, weight]),
            "evicted": jnp.stack([jnp.sum(share_b), jnp.float32(b)]),
            "held": jnp.stack([held * b, jnp.float32(b)]),
        },
    )


def divergence(student: jax.Array, teacher: jax.Array, direction: str) -> jax.Array:
    """KL divergence in nats of log-probabilities [..., v]; see DistillConfig.direction."""
    reverse = jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)
    forward = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return {"reverse": reverse, "forward": forward, "both": (reverse + forward) / 2}[direction]
