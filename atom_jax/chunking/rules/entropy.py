"""BLT's patches: a unit starts where the next byte is hard to foresee (Pagnoni et al., 2024, "Byte Latent
Transformer", section 2.3)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import config
from atom_jax.chunking import bytemodel
from atom_jax.chunking.bytemodel import ByteModel
from atom_jax.chunking.types import END, Boundary, Seen, Tree, ids_of, last_real, previous
from atom_jax.nn import scoring
from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError

KIND = END
# Nats: an entropy that rises by less has not, but for rounding, as where the same bytes follow each other.
_ROUNDING = 1e-5


@config.register
@dataclasses.dataclass(frozen=True)
class Entropy:
    """Ends a unit at byte t where H_t, the entropy in nats of byte t + 1, is high or rises.

    "global": H_t > threshold. "monotonic": H_t - H_(t-1) > increase (at least 1e-5: what rounding makes is no
    increase). "both": both.
    """

    # Nats; the default is the published one, for a mean of 4.5 bytes with BLT's own entropy model.
    threshold: float = 1.335442066192627
    mode: str = "global"
    # Nats.
    increase: float = 0.0
    # Longer units are cut into pieces of so many bytes; 0 = never.
    max_length: int = 0
    # The entropy model, which learns next to the model from the same bytes.
    model: ByteModel = dataclasses.field(default_factory=ByteModel)
    # Factor on the entropy model's loss; 0 leaves its parameters as they are.
    weight: float = 1.0

    def __post_init__(self):
        config.check(self, threshold=(0, 1e6), increase=(0, 1e6), max_length=(0, 2**31 - 1), weight=(0, 1e6))
        if self.mode not in ("global", "monotonic", "both"):
            raise AtomError(f"mode: expected global, monotonic or both, got {self.mode!r}")


@struct.dataclass
class MarksState:
    """Of every row: the latest entropy, f32 [b] in nats, and the bytes since the latest end that an entropy made,
    i32 [b]."""

    entropy: jax.Array
    open: jax.Array

    @classmethod
    def empty(cls, b: int) -> MarksState:
        """Before the first byte."""
        return cls(jnp.zeros(b, jnp.float32), jnp.zeros(b, jnp.int32))


@struct.dataclass
class State:
    """What the rule and its entropy model remember."""

    marks: MarksState
    model: bytemodel.Window


def spec(cfg: Entropy, d: int) -> Tree:
    """Parameters of the entropy model."""
    return bytemodel.spec(cfg.model)


def init_state(cfg: Entropy, d: int, b: int) -> State:
    """What is remembered of b rows before their first byte."""
    return State(MarksState.empty(b), bytemodel.init_state(cfg.model, b))


def apply(p: Tree, seen: Seen, state: State, *, cfg: Entropy) -> tuple[Boundary, State]:
    """END marks; `loss` is the weighted cross-entropy, in nats per byte, of the entropy model on this call's bytes.

    Marks have no gradient. Raises AtomError in a stage that has no ids.
    """
    ids = ids_of(seen, "Entropy")
    logits_btv, model = bytemodel.apply(p, ids, seen.tokens, state.model, cfg=cfg.model)
    log_btv = jax.nn.log_softmax(logits_btv)
    entropy_bt = jax.lax.stop_gradient(scoring.entropy(log_btv))
    mark, marks_state = marks(entropy_bt, seen.tokens, state.marks, cfg)
    loss = cfg.weight * _next_byte_loss(log_btv, ids, seen.tokens)
    return Boundary(mark, loss=loss), State(marks_state, model)


def nearer(state: State, by_b: jax.Array, *, cfg: Entropy) -> State:
    """See `rules`."""
    return state.replace(model=bytemodel.nearer(state.model, by_b, cfg=cfg.model))


def marks(entropy_bt: jax.Array, tokens: Tokens, state: MarksState, cfg: Entropy) -> tuple[jax.Array, MarksState]:
    """END marks bool [b, t] from entropies f32 [b, t] in nats, and the state after them.

    Every document's first byte is a unit. As published, in "monotonic" and "both" its second byte ends one too, and
    in "both" its third does not. Nothing of another document or row has an influence.
    """
    position, real = tokens.positions, tokens.segments > 0
    high = entropy_bt > cfg.threshold
    rises = entropy_bt - previous(entropy_bt, state.entropy) > max(cfg.increase, _ROUNDING)
    if cfg.mode == "global":
        raw = high
    elif cfg.mode == "monotonic":
        raw = rises | (position == 1)
    else:
        raw = (rises & high & (position > 2)) | (position == 1)
    raw = real & (raw | (position == 0))
    # Bytes since the latest raw end, this one included: counted from the latest end, from the document's beginning,
    # or from where an earlier call stopped.
    index = jnp.arange(1, entropy_bt.shape[1] + 1, dtype=jnp.int32)[None]
    latest = jax.lax.cummax(jnp.where(raw, index, 0), axis=1)
    ended = previous(latest, jnp.zeros_like(state.open))
    length = index - ended + jnp.where(ended > 0, 0, state.open[:, None])
    mark = raw
    if cfg.max_length:
        mark = raw | (real & (length % cfg.max_length == 0))
    open_bt = jnp.where(raw, 0, length)
    return mark, MarksState(last_real(entropy_bt, tokens, state.entropy), last_real(open_bt, tokens, state.open))


def _next_byte_loss(log_btv: jax.Array, ids_bt: jax.Array, tokens: Tokens) -> jax.Array:
    """Mean cross-entropy f32 [] over the positions whose document goes on in this call."""
    segments = tokens.segments
    counted = ((segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)).astype(jnp.float32)
    found = jnp.take_along_axis(log_btv[:, :-1], ids_bt[:, 1:, None], axis=2)[..., 0]
    return -jnp.sum(found * counted) / jnp.maximum(jnp.sum(counted), 1.0)
