"""What byteification starts from: texts as bytes and subwords at once, and a Bolmo made of a source model; and what
tuning changed in a source model, put on what was made of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import params
from atom_jax.models import bolmo
from atom_jax.models.bolmo import BolmoConfig, forward
from atom_jax.models.transformer import TransformerConfig
from atom_jax.params import Tree
from atom_jax.tokenizers.byte_view import byte_view
from atom_jax.tokenizers.suffix import SPECIALS
from atom_jax.transfer import transplant
from atom_jax.transfer.byteify import Lesson
from atom_jax.transfer.initialisers import FVT, Aux, Zero
from atom_jax.typing import LM, AtomError, Batch, Suffix

# Rows and bytes per row of the sample that the projection of patches is fitted on.
_SAMPLE = (8, 1024)


def assemble(made: dict[str, Any]) -> Lesson:
    """The lesson of arrays by name (`BolmoTokenizer.spell`)."""
    names = ("ids", "positions", "segments", "targets", "loss_mask")
    suffix = Suffix(made["suffix"], made["state"])
    return Lesson(Batch(**{k: made[k] for k in names}, suffix=suffix), made["tokens"], made["lengths"])


def begin(key: jax.Array, source: LM, cfg: BolmoConfig) -> Tree:
    """Parameters of a Bolmo before stage 1 (section 4.1 of the paper).

    Layers over patches and the final norm are the source's; suffix subwords have its embeddings, and bytes draws with
    their mean and deviation, channel by channel; the projection of patches makes patches of single random bytes like
    them; the predictor compares states as they are; everything else is drawn. Raises AtomError where sizes differ.
    """
    if not isinstance(source.config, TransformerConfig):
        raise AtomError(f"{source.family}: a Bolmo is made of a transformer over subwords")
    table = source.params["embed"].astype(jnp.float32)
    p = params.init(key, bolmo.spec(cfg))
    theirs, ours = params.flatten(source.params["layers"]), params.flatten(p["main"])
    if {k: x.shape for k, x in theirs.items()} != {k: x.shape for k, x in ours.items()}:
        raise AtomError("the source model's layers do not have the sizes of this Bolmo's")
    if cfg.subwords > table.shape[0]:
        raise AtomError(f"subwords: the source model embeds {table.shape[0]} tokens, not {cfg.subwords}")
    mean, deviation = jnp.mean(table, axis=0), jnp.std(table, axis=0)
    key = jax.random.fold_in(key, 1)
    p |= {"main": source.params["layers"], "norm": source.params["norm"]}
    p["embed"] = mean[None] + deviation[None] * jax.random.normal(key, p["embed"].shape)
    if cfg.subwords:
        p["subwords"] = table[: cfg.subwords]
    return p | {"pool": _fitted_pool(jax.random.fold_in(key, 2), p, mean, deviation, cfg)}


def _fitted_pool(key: jax.Array, p: Tree, mean: jax.Array, deviation: jax.Array, cfg: BolmoConfig) -> Tree:
    """The projection of patches, whose outputs have the given mean and deviation when every byte is a patch."""
    ids = jax.random.randint(key, _SAMPLE, SPECIALS, 260)
    places = jnp.broadcast_to(jnp.arange(_SAMPLE[1], dtype=jnp.int32)[None], _SAMPLE)
    found = None
    if cfg.subwords:
        found = Suffix(jax.random.randint(jax.random.fold_in(key, 1), _SAMPLE, 0, cfg.subwords), jnp.zeros(1))
    h_btd = forward.encode(p, Batch(ids, places, jnp.ones_like(ids), suffix=found), cfg)
    u = (h_btd @ p["pool"]["w"]).reshape(-1, mean.shape[0])
    scale = deviation / jnp.maximum(jnp.std(u, axis=0), 1e-9)
    return {"w": p["pool"]["w"] * scale[None], "b": mean - jnp.mean(u, axis=0) * scale}


def add_tuning(lm: LM, tuned: LM, base: LM, alpha: float = 1.0) -> LM:
    """A model with what tuning changed in the model that it was made of: layers (of a Bolmo those over patches;
    section 5 of its paper) and final norm become theirs plus alpha times (tuned - base).

    A transformer with another tokenizer gets the difference of the tables too, row by row: that of the same token, or
    the mean over its pieces. Raises AtomError where the models differ in size, or
    a sum is not finite.
    """
    families = [m.family for m in (tuned, base) if not isinstance(m.config, TransformerConfig)]
    if families or not isinstance(lm.config, BolmoConfig | TransformerConfig):
        raise AtomError("task arithmetic: expected a Bolmo or a transformer, and two transformers over subwords")
    parts = {"main" if isinstance(lm.config, BolmoConfig) else "layers": "layers", "norm": "norm"}
    new: dict[str, Any] = {}
    for ours, theirs in parts.items():
        trees = lm.params[ours], tuned.params[theirs], base.params[theirs]
        shapes = [{k: x.shape for k, x in params.flatten({"": t}).items()} for t in trees]
        if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
            raise AtomError("task arithmetic: the layers of the three models do not have the same sizes")
        new[ours] = jax.tree.map(
            lambda x, t, b: (x + alpha * (t.astype(jnp.float32) - b.astype(jnp.float32))).astype(x.dtype), *trees
        )
    if isinstance(lm.config, TransformerConfig):
        new |= _tables(lm, tuned, base, alpha)
    if lost := [path for path, x in params.flatten(new).items() if not bool(jnp.isfinite(x).all())]:
        raise AtomError(f"task arithmetic: with alpha={alpha:g} {lost[0]} is not finite")
    return LM(lm.config, lm.params | new, lm.tokenizer)


def _tables(lm: LM, tuned: LM, base: LM, alpha: float) -> dict[str, jax.Array]:
    """The tables of a transformer with another tokenizer than the other two, with what tuning changed in theirs."""
    if None in (lm.tokenizer, tuned.tokenizer):
        raise AtomError("task arithmetic: a model has no tokenizer, so nobody knows what its rows stand for")
    ours, after, before = (transplant.stacked(m) for m in (lm, tuned, base))
    if after.shape != before.shape or after.shape[1:] != ours.shape[1:]:
        shapes = ", ".join(str(list(x.shape)) for x in (ours, after, before))
        raise AtomError(f"task arithmetic: the tables of the three models are of different kinds or sizes ({shapes})")
    views = byte_view(tuned.tokenizer), byte_view(lm.tokenizer)
    change, _, _ = transplant.new_table(*views, after - before, FVT(), Aux(), Zero(), {})
    return transplant.unstacked(ours + alpha * change[: len(ours)], lm.params)
