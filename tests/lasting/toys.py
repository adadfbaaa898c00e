"""Models of two layers that have learned to recall: after a key comes the value that followed it before.

A text is filler, four tokens in turn, with facts in it, each a key and its value. `python -m tests.lasting.toys`
(or with the names of some families) trains one model of every family on such texts, which takes minutes on one core,
and writes them to FILE, in half precision. So that this is enough, training begins with a head of the first layer
that looks one token back.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from atom_jax import params
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn import rope
from atom_jax.typing import LM, Batch

FILE = pathlib.Path(__file__).parents[1] / "golden" / "lasting" / "recall_toys.npz"
KEYS, VALUES, FILLER = 32, 16, 4
SIZES = {
    "vocab_size": KEYS + VALUES + FILLER, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
    "head_dim": 16, "d_ff": 64, "max_length": 1024,
}  # fmt: skip
FAMILIES = ("llama", "qwen3")
# Tokens and rows of a batch, the share of filler, and how many of these batches.
STAGES = ((32, 64, 0.0, 400), (96, 24, 0.5, 200), (256, 8, 0.8, 200))


def text(facts, places, tokens):
    """Filler of so many tokens, with these facts, [n, 2], at these places."""
    ids = KEYS + VALUES + np.arange(tokens, dtype=np.int32) % FILLER
    for fact, place in zip(facts, places, strict=True):
        ids[place : place + 2] = fact
    return ids


def facts(seed, n):
    """Keys that all differ, and values of n facts, i32 [n, 2]."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(KEYS)[:n], KEYS + rng.integers(0, VALUES, n)], axis=1).astype(np.int32)


@functools.cache
def toy(family):
    """The model that has learned, without a tokenizer."""
    cfg = TransformerConfig(**SIZES, family=family)
    tree = params.init(jax.random.key(0), transformer.spec(cfg))
    with np.load(FILE) as stored:
        flat = [jnp.asarray(stored[f"{family}{name}"], x.dtype) for name, x in _named(tree)]
    return LM(cfg, jax.tree.unflatten(jax.tree.structure(tree), flat), None)


def _named(tree):
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _batch(rng, tokens, rows, share):
    """Texts of facts, and of this share of filler, and where a value is there that has been said before."""
    pairs, some = tokens // 2, rng.integers(4, KEYS // 2 + 1)
    key = np.argsort(rng.random((rows, KEYS)), axis=1)[:, :some]
    value = KEYS + rng.integers(0, VALUES, (rows, some))
    which = rng.integers(0, some, (rows, pairs))
    is_fact = rng.random((rows, pairs)) >= share
    said = np.stack([np.take_along_axis(x, which, axis=1) for x in (key, value)], axis=-1)
    filler = KEYS + VALUES + np.arange(tokens).reshape(1, pairs, 2) % FILLER
    ids = np.where(is_fact[..., None], said, filler).reshape(rows, tokens)
    earlier = (which[:, :, None] == which[:, None]) & is_fact[:, None] & np.tri(pairs, k=-1, dtype=bool)
    known = np.zeros((rows, tokens), bool)
    known[:, 1::2] = is_fact & earlier.any(2)
    return ids.astype(np.int32), known


def begun(cfg, seed):
    """Parameters whose embeddings have one channel in common, from which a head of the first layer has queries and
    keys that are nearest one token apart."""
    tree = params.init(jax.random.key(seed), transformer.spec(cfg))
    size, a = cfg.head_dim, tree["layers"]["attn"]
    freq = np.asarray(rope.frequencies(size, cfg.rope_theta, None)[0])
    back = np.concatenate([np.cos(freq), -np.sin(freq)])
    embed = (tree["embed"] * 20).at[:, 0].set(1.0)
    q, k = (
        a["q"].at[0, :, 0].set(0).at[0, 0, 0].set(4 * back),
        a["k"].at[0, :, 0].set(0).at[0, 0, 0, : size // 2].set(2),
    )
    # Where queries and keys are normalised, their sizes are those of these weights.
    sizes = {name: a[name].at[0].set(2.0) for name in ("q_norm", "k_norm") if name in a}
    return {**tree, "embed": embed, "layers": {**tree["layers"], "attn": {**a, "q": q, "k": k, **sizes}}}


def train(cfg, seed):
    """Parameters after all stages."""
    tree, rng = begun(cfg, seed), np.random.default_rng(seed)
    count = sum(n for *_, n in STAGES)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 4e-3, 100, count, 1e-4), b2=0.98)

    def loss(tree, ids, known):
        place = jnp.broadcast_to(jnp.arange(ids.shape[1] - 1), (len(ids), ids.shape[1] - 1))
        out, _ = transformer.apply(tree, Batch(ids[:, :-1], place, jnp.ones_like(place)), cfg=cfg)
        logp = jax.nn.log_softmax(out.logits)
        nats = -jnp.take_along_axis(logp, ids[:, 1:, None], axis=2)[..., 0]
        again = known[:, 1:]
        right = (out.logits.argmax(-1) == ids[:, 1:]) & again
        return (nats * jnp.where(again, 1.0, 0.1)).sum() / again.sum(), right.sum() / again.sum()

    @jax.jit
    def step(tree, state, ids, known):
        (_, right), grads = jax.value_and_grad(loss, has_aux=True)(tree, ids, known)
        updates, state = optimizer.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, right

    state, made = optimizer.init(tree), 0
    for tokens, rows, share, steps in STAGES:
        for _ in range(steps):
            tree, state, right = step(tree, state, *_batch(rng, tokens, rows, share))
            made += 1
            if made % 50 == 0:
                print(cfg.family, made, f"right {float(right):.3f}", flush=True)
    return tree


def main(families):
    """Writes FILE anew, with models of these families trained and the others as they are there."""
    found = {}
    if FILE.exists():
        with np.load(FILE) as stored:
            found = dict(stored)
    for family in families or FAMILIES:
        trained = train(TransformerConfig(**SIZES, family=family), FAMILIES.index(family))
        found |= {f"{family}{name}": np.asarray(x, np.float16) for name, x in _named(trained)}
        np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main(sys.argv[1:])
