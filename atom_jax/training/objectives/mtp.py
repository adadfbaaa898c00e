"""Multi-token heads, trained towards what the model itself says once it gets there; it stays as it is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax import params as params_lib
from atom_jax.models import mtp, transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn import scoring
from atom_jax.nn.embedding import lookup
from atom_jax.params import Tree
from atom_jax.training.losses import Sums
from atom_jax.training.objectives.base import Objective, Rows, Setting, check_frozen, forward_flops, register
from atom_jax.training.plots import Pages
from atom_jax.typing import AtomError, Batch


@register
@dataclasses.dataclass(frozen=True)
class MultiToken(Objective):
    """heads: how many, each for a token further ahead. width: of what is in between; 0: as wide as the model.
    decay: the loss of each head counts so many times as much as that of the one before, since its token is of use
        only where those before it are right (0.8 is Medusa's; Cai et al., 2024, 2401.10774).

    What is minimised is KL(model || head) over the whole vocabulary: the model has read the text up to the token
    before the one that the head guesses at, the head has the state further back and the tokens in between.
    """

    heads: int = 4
    width: int = 0
    decay: float = 0.8

    name: ClassVar[str] = "mtp"
    pages: ClassVar[Pages] = {
        "mtp": {
            "KL in nats per token": {"kl": ""},
            "share of tokens": {"agreement_1": "head 1 agrees", "agreement_2": "head 2"},
            "tokens that a draft gains": {"accepted": ""},
        }
    }

    def __post_init__(self):
        config.check(self, heads=(1, 64), width=(0, 2**20), decay=(1e-6, 1e6))

    def check(self, exp: Any) -> None:
        """A transformer that is frozen, and rows that are long enough."""
        cfg = exp.model
        if not isinstance(cfg, TransformerConfig):
            raise AtomError(f"mtp: the model must be a transformer over tokens, not a {type(cfg).__name__}")
        if exp.data.seq_len < self.heads + 2:
            raise AtomError(
                f"mtp: rows of data.seq_len {exp.data.seq_len} tokens are too short for {self.heads} heads"
            )
        check_frozen(exp, self.name, params_lib.flatten(transformer.spec(cfg)))

    def extra_spec(self, cfg: TransformerConfig) -> Tree:
        """The heads as "mtp"."""
        return {mtp.NAME: mtp.spec(cfg.d_model, self.heads, self.width)}

    def begin(self, setting: Setting, params: Any, places: Tree, data: Iterator[Rows]) -> tuple[Any, list[str]]:
        """The model as it is; heads are drawn."""
        if params is None:
            raise AtomError("mtp: set init_from, the model that the heads are for")
        return params, []

    def counts(self, batch: Batch, setting: Setting) -> dict[str, jax.Array]:
        """f32: the targets [], and the tokens at which every head guesses [heads]."""
        guessed = [jnp.sum(_guessed(batch, k), dtype=jnp.float32) for k in range(self.heads)]
        return {"targets": jnp.sum(batch.loss_mask, dtype=jnp.float32), "guessed": jnp.stack(guessed)}

    def loss(self, params: Any, batch: Batch, key: Any, step: Any, *, setting: Setting, counts: Any = None) -> Sums:
        """nats, tokens: cross-entropy of the first head, two tokens ahead, with the text. learned: kl of all heads by
        weight; agreement_N, the share of tokens that the Nth head and the model both think likeliest; accepted, the
        tokens of a draft up to the first at which they don't, where the text is what was drafted."""
        cfg, own = setting.exp.model, self.counts(batch, setting)
        whole = own if counts is None else counts
        frozen = jax.lax.stop_gradient({name: x for name, x in params.items() if name != mtp.NAME})
        x_btd, _, _ = transformer.hidden(frozen, batch, cfg=cfg)
        x_btd = jax.lax.stop_gradient(x_btd)
        says = functools.partial(transformer.logits, scoring.gathered(frozen), cfg=cfg)
        weights = self.decay ** jnp.arange(self.heads, dtype=jnp.float32)
        weights /= jnp.sum(weights)
        state, right, kl, agreed, first = x_btd, True, [], {}, None
        accepted = jnp.float32(0)
        for k in range(self.heads):
            token = lookup(frozen["embed"], _ahead(batch.targets, k), cfg.dtype)
            state = mtp.head(jax.tree.map(lambda p, k=k: p[k], params[mtp.NAME]), state, token)
            found = scoring.score(
                says, state, _ahead(batch.targets, k + 1), ("nats", "forward", "agree"),
                teacher=(says, _ahead(x_btd, k + 1)),
            )  # fmt: skip
            real = _guessed(batch, k)
            kl.append(jnp.sum(found["forward"] * real))
            right &= found["agree"] & real
            accepted += jnp.sum(right, dtype=jnp.float32)
            agreed[f"agreement_{k + 1}"] = jnp.stack([jnp.sum(found["agree"] & real), own["guessed"][k]])
            first = jnp.sum(found["nats"] * real) if k == 0 else first
        nats_k = jnp.stack(kl)
        mean = jnp.sum(weights * nats_k / jnp.maximum(whole["guessed"], 1.0))
        learned = {
            "kl": jnp.stack([jnp.sum(weights * nats_k), jnp.sum(weights * own["guessed"])]),
            "accepted": jnp.stack([accepted, own["guessed"][0]]),
        }
        return Sums(
            objective=mean * whole["targets"],
            nats=first,
            tokens=own["guessed"][0].astype(jnp.int32),
            bytes=None,
            learned=learned | agreed,
        )

    def operations(self, setting: Setting, factors: Mapping[str, float]) -> tuple[float, float]:
        """The model's pass forward, and of every head both passes, with logits of its own and those of the model,
        through which the table gets no gradient."""
        cfg, data = setting.exp.model, setting.exp.data
        heads = params_lib.flatten(self.extra_spec(cfg))
        inner = sum(params_lib.count(s) for s in heads.values() if len(s.shape) > 2)
        table = 2 * cfg.d_model * cfg.vocab_size
        return (forward_flops(setting.exp) - table + 6 * inner + 3 * self.heads * table) * (
            data.batch_size * data.seq_len
        ), 0.0


def _ahead(x_bt: jax.Array, k: int) -> jax.Array:
    """[b, t, ...] with the values k positions later; zeros behind the end."""
    return jnp.pad(x_bt[:, k:], [(0, 0), (0, k)] + [(0, 0)] * (x_bt.ndim - 2))


def _guessed(batch: Batch, k: int) -> jax.Array:
    """bool [b, t]: positions from whose state head k guesses at a target that counts, k + 1 positions later in the
    same document."""
    later = _ahead(batch.segments, k + 1)
    return (later > 0) & (later == batch.segments) & _ahead(batch.loss_mask, k + 1)
