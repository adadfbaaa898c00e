"""Retrofitting learned evictors: a model with eviction is trained towards itself without (Łańcucki et al., 2025).

Merging (`kvcache.dmc`) is learned in the same way: what merges is what is evicted here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.kvcache.policy import Mode, Policy
from atom_jax.models import transformer
from atom_jax.nn import scoring
from atom_jax.training.losses import Sums, counted_bytes
from atom_jax.training.objectives.base import Objective, Setting, forward_flops, register, training_flops
from atom_jax.training.plots import Pages
from atom_jax.typing import AtomError, Batch


@register
@dataclasses.dataclass(frozen=True)
class Distill(Objective):
    """direction: "reverse", KL(student || teacher), as in the released code; "forward", KL(teacher || student); or
        "both", their mean.
    cr_start, cr_end, cr_steps: the compression ratio CR rises linearly over so many steps; a share 1 - 1/CR of all
        decisions should evict, and what is missing from it is added to the loss, `weight` times.
    cool: relaxed decisions become harder over these steps: factor on their temperature in the end.
    fade_steps: of the borrowed form: steps over which the borrowed channel leaves attention, before anything is
        evicted.
    remat: compute the layers again in the backward pass instead of keeping their activations.
    """

    direction: str = "reverse"
    cr_start: float = 1.0
    cr_end: float = 8.0
    cr_steps: int = 238
    weight: float = 1.0
    cool: float = 1.0
    fade_steps: int = 0
    remat: bool = True

    name: ClassVar[str] = "distill"
    weighs: ClassVar[bool] = True
    pages: ClassVar[Pages] = {
        "distill": {
            "KL in nats per token": {"kl": "all alike", "weighted_kl": "by weight"},
            "share of tokens or decisions": {"agreement": "equally likeliest", "evicted": "evicting"},
            "entries held": {"held": ""},
        }
    }

    def __post_init__(self):
        config.check(self, weight=(0, 1e6), cool=(1e-6, 1))
        if self.direction not in ("reverse", "forward", "both"):
            raise AtomError(f"distill.direction: expected reverse, forward or both, got {self.direction!r}")
        if min(self.cr_start, self.cr_end) < 1 or self.cr_steps < 1 or self.fade_steps < 0:
            raise AtomError(
                "distill: cr_start and cr_end must be at least 1, cr_steps positive, fade_steps not negative"
            )

    @property
    def directions(self) -> tuple[str, ...]:
        """The divergences whose mean is minimised."""
        return ("reverse", "forward") if self.direction == "both" else (self.direction,)

    def progress(self, step: Any) -> jax.Array:
        """From 0 to 1 while the compression ratio rises, f32 []."""
        return jnp.clip((step - self.fade_steps) / self.cr_steps, 0.0, 1.0)

    def target(self, step: Any) -> jax.Array:
        """The share of decisions that should evict at a step, f32 []."""
        return 1.0 - 1.0 / (self.cr_start + (self.cr_end - self.cr_start) * self.progress(step))

    def check(self, exp: Any) -> None:
        """The model's memory must have something to learn."""
        memory = getattr(exp.model, "memory", None)
        if not isinstance(memory, Policy) or not memory.learns:
            raise AtomError("distill: the model has no learned evictors; set memory to a policy that learns")

    def counts(self, batch: Batch, setting: Setting) -> dict[str, jax.Array]:
        """See `counts`."""
        return counts(batch, setting.exp.model)

    def loss(
        self, params: Any, batch: Batch, key: jax.Array | None, step: Any, *, setting: Setting, counts: Any = None
    ) -> Sums:
        """See `self_distillation`."""
        cfg, lengths = setting.exp.model, setting.lengths
        return self_distillation(params, batch, key, step, cfg=cfg, lengths=lengths, how=self, whole=counts)

    def operations(self, setting: Setting, factors: Mapping[str, float]) -> tuple[float, float]:
        """With the teacher's pass; the student's layers are those that may be computed again."""
        data, forward = setting.exp.data, forward_flops(setting.exp)
        tokens, again = data.batch_size * data.seq_len, forward if self.remat else 0.0
        return (training_flops(setting.exp, factors) + forward) * tokens, again * tokens


def counts(batch: Batch, cfg: transformer.TransformerConfig) -> dict[str, jax.Array]:
    """f32 []: targets, those of them in the divergence, the sum of the weights of these (1 each, where the batch has
    none), rows, and documents in them."""
    documents = jnp.sum(jnp.max(batch.segments, axis=1), dtype=jnp.float32)
    compared = jnp.sum(_compared(batch, cfg), dtype=jnp.float32)
    weights = compared if batch.loss_weights is None else jnp.sum(_compared(batch, cfg) * batch.loss_weights)
    targets = jnp.sum(batch.loss_mask, dtype=jnp.float32)
    rows = jnp.float32(batch.ids.shape[0])
    return {"targets": targets, "compared": compared, "weights": weights, "rows": rows, "documents": documents}


def self_distillation(
    params: Any,
    batch: Batch,
    key: jax.Array | None = None,
    step: jax.Array | None = None,
    *,
    cfg: transformer.TransformerConfig,
    lengths: np.ndarray,
    how: Distill,
    whole: dict[str, jax.Array] | None = None,
    block: int | None = None,
) -> Sums:
    """Divergence from the same weights without eviction, its mean over tokens or, where there are
    `batch.loss_weights`, over these, plus the missing share of evictions.

    With a key, decisions are relaxed and drawn; without (validation), they are hard, and no share is demanded. The
    rest as for `losses.next_token`; positions whose input ends a text do not count in the divergence. whole: `counts`
    of the batch that this one is a part of. `learned`: kl (nats per token, of all alike), weighted_kl (the mean over
    weights, where there are some), agreement (share of tokens where both think the same token likeliest), evicted
    (share of decisions), held (entries per head at the end of a document).
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
        relaxed = cfg.memory.mode(key, cfg.n_layers, b, cfg.n_kv_heads, t)
        cool = None if how.cool == 1 or step is None else how.cool ** how.progress(step)
        student_mode = relaxed.replace(noise=relaxed.noise + before, fade=fade, cool=cool)
    frozen = jax.lax.stop_gradient(params)
    teacher, _, _ = transformer.hidden(frozen, batch, cfg=cfg, mode=teacher_mode)
    student, _, aux = transformer.hidden(
        params, batch, cfg=dataclasses.replace(cfg, remat=how.remat), mode=student_mode
    )
    found = scoring.score(
        functools.partial(transformer.logits, scoring.gathered(params), cfg=cfg),
        student, batch.targets, ("nats", "agree", *how.directions), block=block,
        teacher=(functools.partial(transformer.logits, scoring.gathered(frozen), cfg=cfg), teacher),
    )  # fmt: skip
    divergence = sum(found[name] for name in how.directions) / len(how.directions)
    compared, own = _compared(batch, cfg), counts(batch, cfg)
    kl, agree = jnp.sum(divergence * compared), jnp.sum(found["agree"] * compared)
    weighted = kl if batch.loss_weights is None else jnp.sum(divergence * compared * batch.loss_weights)
    real = (batch.segments > 0)[None, :, None].astype(jnp.float32)
    share_b = jnp.sum(aux["evict_soft"] * real, (0, 2, 3)) / jnp.maximum(
        jnp.sum(real, (0, 2, 3)) * cfg.n_layers * cfg.n_kv_heads, 1.0
    )
    missing = jnp.float32(0)
    if key is not None and step is not None:
        missing = how.weight * jnp.sum(jnp.maximum(how.target(step) - share_b, 0.0))
    whole = own if whole is None else whole
    loss = weighted / jnp.maximum(whole["weights"], 1.0) + missing / whole["rows"]
    held = jnp.sum(jnp.mean(aux["occupancy"].astype(jnp.float32), axis=(0, 2)))
    return Sums(
        objective=loss * whole["targets"],
        nats=jnp.sum(found["nats"] * batch.loss_mask),
        tokens=jnp.sum(batch.loss_mask, dtype=jnp.int32),
        bytes=counted_bytes(lengths, batch),
        learned={
            "kl": jnp.stack([kl, own["compared"]]),
            "agreement": jnp.stack([agree, own["compared"]]),
            "evicted": jnp.stack([jnp.sum(share_b), own["rows"]]),
            "held": jnp.stack([held, own["documents"]]),
        }
        | ({} if batch.loss_weights is None else {"weighted_kl": jnp.stack([weighted, own["weights"]])}),
    )


def _compared(batch: Batch, cfg: transformer.TransformerConfig) -> jax.Array:
    """bool [b, t]: targets that count and whose input does not end a text."""
    return batch.loss_mask & ~jnp.isin(batch.ids, jnp.array(cfg.eos_ids or (-1,)))
