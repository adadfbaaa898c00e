"""Neural memories against numbers of titans-pytorch (tests/golden/lasting): four kinds, in calls of any length."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.nn import neural_memory
from atom_jax.nn.attention import Tokens
from atom_jax.nn.neural_memory import NeuralState

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lasting"
# heads, matrices, chunk, batch, tolerance
KINDS = {
    "linear": (1, 1, 4, None, 1e-5),
    "mlp": (2, 2, 4, None, 1e-5),
    "nomomentum": (1, 1, 1, None, 1e-5),
    "batch": (1, 2, 2, 8, 5e-5),
}


def weights(z):
    """Parameters of `neural_memory.layer` from those of the package."""
    old = {name.removeprefix("param."): z[name] for name in z if name.startswith("param.")}
    h, k = old["memory_model_parameters/0"].shape
    gates = {"rate": "to_adaptive_step", "decay": "to_decay_factor", "momentum": "to_momentum"}
    p = {
        "store_norm": old["store_norm/weight"],
        "read_norm": old["retrieve_norm/weight"],
        **{x[0]: old[f"to_{x}/weight"].T.reshape(-1, h, k) for x in ("queries", "keys", "values")},
        **{
            name: {"w": old[f"{of}/0/weight"].T, "b": old[f"{of}/0/bias"]}
            for name, of in gates.items()
            if f"{of}/0/weight" in old
        },
        "gamma": old["memory_model_parameters/0"],
        "matrices": {
            str(i - 1): old[f"memory_model_parameters/{i}"] for i in (1, 2) if f"memory_model_parameters/{i}" in old
        },
    }
    p |= (
        {}
        if h == 1
        else {"gate": old["retrieve_gate/0/weight"].T, "o": old["combine_heads/weight"].T.reshape(h, k, -1)}
    )
    names = {"queries": "q", "keys": "k", "values": "v"}
    return {names.get(name, name): x for name, x in p.items()}


def tokens(first, *counts, t=None):
    """Of rows that go on at `first` with so many positions."""
    t = t or max(counts)
    real = np.arange(t)[None] < np.array(counts)[:, None]
    positions = np.where(real, first + np.arange(t)[None], 0)
    return Tokens(jnp.asarray(positions, jnp.int32), jnp.asarray(real, jnp.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_official_numbers_in_one_call_and_in_many(kind):
    h, matrices, chunk, batch, tolerance = KINDS[kind]
    z = np.load(GOLDEN / f"titans_{kind}.npz")
    p, x = weights(z), np.concatenate([z["x1"], z["x2"]], axis=1)
    y = np.concatenate([z["y1"], z["y2"]], axis=1)
    run = jax.jit(neural_memory.layer, static_argnames=("chunk", "batch", "rate"))
    how = {"chunk": chunk, "batch": batch, "rate": 0.3}
    empty = NeuralState.empty(2, 8, h, matrices, chunk)
    whole, state = run(p, x, tokens(0, 24, 24), empty, **how)
    np.testing.assert_allclose(whole, y, atol=tolerance)
    for name, found in (
        ("final_weight", state.weights),
        ("final_momentum", state.momentum),
        ("weights_used", state.used),
    ):
        if f"{name}.norm.gamma" not in z:
            continue
        flat = z[f"{name}.norm.gamma"].reshape(2, h, -1)
        np.testing.assert_allclose(found.gamma, flat, atol=tolerance)
        for i, w in enumerate(found.matrices):
            np.testing.assert_allclose(w, z[f"{name}.model.weights.{i}"].reshape(w.shape), atol=tolerance)
    # Calls that end within chunks, the second with one row longer than the other.
    state, made = empty, [[], []]
    for first, counts in (
        ((0, 0), (7, 7)),
        ((7, 7), (3, 9)),
        ((10, 16), (9, 1)),
        ((19, 17), (1, 1)),
        ((20, 18), (4, 6)),
    ):
        ids = np.stack([np.pad(row[a : a + n], ((0, 9 - n), (0, 0))) for row, a, n in zip(x, first, counts)])
        out, state = run(p, ids, tokens(np.array(first)[:, None], *counts, t=9), state, **how)
        for row, one, n in zip(made, out, counts):
            row.append(one[:n])
    for row, want in zip(made, y):
        # Rounding of one call grows in the next.
        np.testing.assert_allclose(np.concatenate(row), want, atol=2 * tolerance)


def test_documents_begin_anew_and_gradients_are_those_of_rows_apart():
    z = np.load(GOLDEN / "titans_mlp.npz")
    p, row = weights(z), z["x1"][0]
    cuts = (0, 3, 4, 13, 16)
    positions = np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(cuts)])
    segments = np.repeat(np.arange(1, 5), np.diff(cuts))
    packed = Tokens(*(jnp.asarray(x[None], jnp.int32) for x in (positions, segments)))

    def together(p):
        return neural_memory.layer(p, row[None], packed, None, 4, 8)[0][0]

    def apart(p):
        rows = np.stack([np.pad(row[a:b], ((0, 9 - (b - a)), (0, 0))) for a, b in itertools.pairwise(cuts)])
        out, _ = neural_memory.layer(p, rows, tokens(0, *np.diff(cuts)), None, 4, 8)
        return jnp.concatenate([one[:n] for one, n in zip(out, np.diff(cuts))])

    def loss(form):
        y, back = jax.vjp(jax.jit(form), p)
        return y, *jax.tree.leaves(back(jnp.cos(y)))

    for found, expected in zip(loss(together), loss(apart), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)
