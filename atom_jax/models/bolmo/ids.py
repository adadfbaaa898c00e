"""What a Bolmo's ids mean: bytes, each in two forms, and subwords that end at them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.models.bolmo.config import FUSED, BolmoConfig
from atom_jax.models.family import Codec, Draw
from atom_jax.tokenizers.bolmo import BolmoTokenizer
from atom_jax.typing import Suffix


@dataclasses.dataclass(frozen=True)
class ByteCodec(Codec):
    """Ids from 260 on are those before them where they end a patch.

    Of a prompt's last byte it is not known whether it ends a patch: generation begins with that decision. Which bytes
    make a patch is no matter of taste: whatever the temperature is, that is drawn as the model has it, or is the
    likelier case.
    """

    looks: bool = True
    pending: ClassVar[bool] = True
    # Padding, and two without a meaning.
    unused: ClassVar[tuple[int, ...]] = (0, 2, 3, FUSED, FUSED + 2, FUSED + 3)

    def pick(self, logits_bv: jax.Array, draw: Draw) -> jax.Array:
        """At temperature 0 the likeliest id of all, as the official code has it. Else the byte is drawn by the sum of
        its forms, with temperature and cuts, and then its form: at temperature 1 without cuts that is a draw from all
        ids."""

        def warm() -> jax.Array:
            drawn = self._in_form(logits_bv, draw.token(self.merge(logits_bv)), draw)
            return jnp.where(draw.cold, draw.token(logits_bv), drawn)

        return jax.lax.cond(jnp.all(draw.cold), lambda: draw.token(logits_bv), warm)

    def begin(self, logits_bv: jax.Array, token_b: jax.Array, first_b: jax.Array, draw: Draw) -> jax.Array:
        """A text's first byte ends a patch."""
        token_b = self.plain(token_b)
        return jnp.where(first_b, token_b + FUSED, self._in_form(logits_bv, token_b, draw))

    def _in_form(self, logits_bv: jax.Array, token_b: jax.Array, draw: Draw) -> jax.Array:
        """Bytes i32 [b], as ids below 260, in the form that is chosen for them."""
        pair = jnp.take_along_axis(logits_bv, jnp.stack([token_b, token_b + FUSED], axis=1), axis=1)
        pair = pair.astype(jnp.float32)
        return token_b + FUSED * draw.yes(pair[:, 1] - pair[:, 0]).astype(jnp.int32)

    def forms(self, ids: np.ndarray) -> np.ndarray:
        plain = self.plain(ids)
        return np.unique(np.concatenate([plain, plain + FUSED]))

    def plain(self, ids: Any) -> Any:
        return ids % FUSED

    def merge(self, logits: jax.Array) -> jax.Array:
        inside, end = jnp.split(logits.astype(jnp.float32), 2, axis=-1)
        return jnp.logaddexp(inside, end)

    def fuse(self, targets_bt: jax.Array, aux: dict[str, Any]) -> jax.Array:
        """Ids from 260 on where the predictor says that the position of the target ends a patch."""
        after = jnp.pad(aux["boundaries"][0][:, 1:], ((0, 0), (0, 1)))
        return self.plain(targets_bt) + FUSED * after

    def beside(self, tokenizer: Any) -> dict[str, Any]:
        """The automaton that finds subwords, as "suffix"."""
        tables = tokenizer.tables if self.looks and isinstance(tokenizer, BolmoTokenizer) else None
        return {} if tables is None else {"suffix": tables}

    def suffix(self, tokenizer: Any, ids_bt: np.ndarray, mask_bt: np.ndarray) -> Suffix | None:
        if not self.beside(tokenizer):
            return None
        states = tokenizer.suffix_states(ids_bt)
        last = np.max(np.where(mask_bt, np.arange(ids_bt.shape[1])[None], 0), axis=1)
        state = np.take_along_axis(states, last[:, None], axis=1)[:, 0]
        return Suffix(jnp.asarray(tokenizer.tables.out[states]), jnp.asarray(state))


def codec(cfg: BolmoConfig) -> ByteCodec:
    """See `Family`."""
    return ByteCodec(looks=cfg.subwords > 0)
