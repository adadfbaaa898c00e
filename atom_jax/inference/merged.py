"""Prompts that a model reads in merged tokens (`tokenizers.dynamic`), and what it says after them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.models import registry
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn import scoring
from atom_jax.session.prompts import check_model, padded, token_rows
from atom_jax.tokenizers.dynamic import Merged, Merger
from atom_jax.transfer.merged_rows import MergedRows
from atom_jax.typing import LM, AtomError, Batch


class MergedReader:
    """Reads prompts in merged tokens, whose input rows are means of those of their pieces.

    boundary: as of `Merger`. capacity: merged tokens of which rows are kept. Raises AtomError for models that are no
    transformers over tokens with bytes, or that have another memory than the dense cache.
    """

    def __init__(self, lm: LM, boundary: str = "pretokens", capacity: int = 5000):
        check_model(lm)
        if type(lm.config) is not TransformerConfig or lm.tokenizer is None:
            raise AtomError(f"{lm.family}: merged tokens are for transformers with a tokenizer")
        if lm.config.memory is not None:
            raise AtomError("merged tokens: this model has a cache policy; choose the dense cache")
        self.lm, self.merger = lm, Merger(lm.tokenizer, boundary)
        if (size := self.merger.view.size) > lm.config.vocab_size:
            raise AtomError(f"the tokenizer has {size} ids, the model {lm.config.vocab_size}")
        table = np.asarray(lm.params["embed"], np.float32)
        self.rows = MergedRows(self.merger.view, table[:, None], capacity)

    def merge(self, prompts: Any, most: int | None = None) -> Merged:
        """Texts or lists of ids as one batch, after up to `most` merges (None: all that there are)."""
        return self.merger.merge(token_rows(self.lm, prompts, first=True), most)

    def logprobs(self, merged: Merged, answers: Sequence[str | Sequence[int]]) -> list[np.ndarray]:
        """Log-probabilities f32 [n], in nats, of the tokens of one answer after each row of a batch; answers are read
        in the vocabulary's own tokens. Raises AtomError for rows that are too long."""
        said = token_rows(self.lm, answers, first=False)
        if len(said) != len(merged.rows):
            raise AtomError(f"answers: there are {len(said)}, but {len(merged.rows)} prompts")
        if empty := [i for i, row in enumerate(merged.rows) if not len(row)]:
            raise AtomError(f"prompts[{empty[0]}] is empty, and the model has no token that begins a text")
        slots, vocab = self.rows.slots(merged.pieces), self.lm.config.vocab_size
        table = np.concatenate([np.arange(merged.size), vocab + slots])
        ids, lengths = padded([np.append(table[row], answer) for row, answer in zip(merged.rows, said)])
        if (longest := int(lengths.max())) > self.lm.config.max_length:
            raise AtomError(
                f"a row of {longest} tokens exceeds the {self.lm.config.max_length} positions of the model"
            )
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        segments = (positions < lengths[:, None]).astype(np.int32)
        # What comes next is looked at in answers only, which have no made tokens.
        targets = np.where(ids < vocab, ids, 0)
        batch = Batch(*(jnp.asarray(x) for x in (ids, positions, segments, targets)))
        nats = np.asarray(_nats(self.lm.params, jnp.asarray(self.rows.table[:, 0]), batch, cfg=self.lm.config))
        ends = [(length - len(answer) - 1, length - 1) for length, answer in zip(lengths, said)]
        return [-row[first:last] for row, (first, last) in zip(nats, ends)]


@functools.partial(jax.jit, static_argnames="cfg")
def _nats(params: Any, made_cd: jax.Array, batch: Batch, *, cfg: TransformerConfig) -> jax.Array:
    """Of every token but the first, f32 [b, t - 1]; ids from vocab_size on are rows of made_cd."""
    model, table = registry.of(cfg), params["embed"]
    wide = params | {"embed": jnp.concatenate([table, made_cd.astype(table.dtype)])}
    x_btd, _, _ = model.hidden(wide, batch, cfg=cfg)
    head = functools.partial(model.logits, params, cfg=cfg)
    return scoring.score(head, x_btd[:, :-1], batch.targets[:, 1:])["nats"]
