"""Hashed n-grams against the paper's formulas, written out position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params
from atom_jax.nn import ngrams
from atom_jax.nn.attention import Tokens
from atom_jax.nn.ngrams import NgramState, Tables
from atom_jax.typing import AtomError

TABLES = Tables(size=10, heads=2, longest=3, channels=3)
D, EPS = 8, 1e-5
RNG = np.random.default_rng(0)
DRAWN = params.init(jax.random.key(0), ngrams.layer_spec(D, TABLES))
P = {name: np.asarray(x) + RNG.normal(size=x.shape).astype(np.float32) for name, x in DRAWN.items()}
FACTORS = [int(f) for f in TABLES.factors]


def reference(ids, x, primes=(11, 13, 17, 19)):
    """[t, d] of one document."""
    norm = lambda a, w: a / np.sqrt((a**2).mean() + EPS) * w  # noqa: E731
    starts, out, inputs = np.cumsum([0, *primes]), [], []
    for t in range(len(ids)):
        grams = [(2, 0), (2, 1), (3, 2), (3, 3)]
        e = []
        for n, table in grams:
            mixed = 0
            for back in range(n):
                mixed ^= (int(ids[t - back]) if t >= back else 0) * FACTORS[back] % 2**32
            e.append(P["table"][starts[table] + mixed % primes[table]])
        e = np.concatenate(e)
        s = norm(e @ P["key"] + P["key_bias"], P["key_norm"]) @ x[t] / D**0.5
        v = (e @ P["value"] + P["value_bias"]) / (1 + np.exp(-np.sign(s) * np.sqrt(max(abs(s), 1e-6))))
        inputs.append(norm(v, P["conv_norm"]))
        y = sum(P["conv"][:, 3 - i] * inputs[t - 3 * i] for i in range(4) if t >= 3 * i)
        out.append(v + y / (1 + np.exp(-y)))
    return np.array(out)


def given(lengths, t=24):
    """ids, inputs and tokens of a row of documents, padded."""
    n = sum(lengths)
    ids, x = RNG.integers(0, 50000, n), RNG.normal(size=(n, D)).astype(np.float32)
    positions = np.concatenate([np.arange(m) for m in lengths])
    segments = np.repeat(np.arange(len(lengths)) + 1, lengths)
    pad = lambda a: jnp.asarray(np.pad(a, [(0, t - n)] + [(0, 0)] * (a.ndim - 1)))[None]  # noqa: E731
    return ids, x, pad(ids.astype(np.int32)), pad(x), Tokens(pad(positions), pad(segments))


@jax.jit
def run(x, ids, tokens, state):
    return ngrams.layer({name: jnp.asarray(w) for name, w in P.items()}, x, ids, tokens, state, TABLES, EPS)


def test_a_row_of_documents_is_what_the_formulas_say():
    assert TABLES.primes == (11, 13, 17, 19) and all(f % 2 for f in FACTORS)
    ids, x, row_ids, row_x, tokens = given((13, 2, 7))
    found, state = run(row_x, row_ids, tokens, None)
    parts = zip(np.split(ids, (13, 15)), np.split(x, (13, 15)))
    np.testing.assert_allclose(found[0, :22], np.concatenate([reference(*p) for p in parts]), atol=2e-5, rtol=1e-4)
    assert state is None


@pytest.mark.parametrize("cuts", [(1,) * 20, (5, 15), (2, 11, 1, 6)])
def test_parts_and_single_tokens_are_what_all_at_once_is(cuts):
    *_, ids, x, tokens = given((20,), 20)
    whole, _ = run(x, ids, tokens, None)
    state, found = NgramState.empty(1, D, TABLES, jnp.float32), []
    for n, end in zip(cuts, np.cumsum(cuts)):
        part = lambda a, n=n, end=end: jnp.pad(a[:, end - n : end], [(0, 0), (0, 16 - n)] + [(0, 0)] * (a.ndim - 2))  # noqa: E731
        y, state = run(part(x), part(ids), Tokens(part(tokens.positions), part(tokens.segments)), state)
        found.append(y[0, :n])
    np.testing.assert_allclose(np.concatenate(found), whole[0], atol=1e-6)
    # A row in which nothing stands keeps what it has.
    empty = Tokens(jnp.zeros((1, 16), jnp.int32), jnp.zeros((1, 16), jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, run(part(x), part(ids), empty, state)[1], state)


def test_gradients_reach_what_was_read_and_nothing_else():
    *_, ids, x, tokens = given((6,), 6)
    loss = lambda p: jnp.sin(ngrams.layer(p, x, ids, tokens, None, TABLES, EPS)[0]).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(P)
    read = np.zeros(len(P["table"]), bool)
    read[np.asarray(ngrams.find(ids, tokens, TABLES)).ravel()] = True
    np.testing.assert_array_equal(np.abs(grads["table"]).max(1) > 0, read)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_what_is_asked_wrongly():
    with pytest.raises(AtomError, match="expected 2 to 8 ids"):
        Tables(longest=1)
