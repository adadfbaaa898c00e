"""Product keys against numbers of the official code (tests/golden/lasting), and against a look at every entry."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.nn import product_keys

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lasting"


def weights(z):
    """Parameters of `product_keys.layer` from those of the official module."""
    h, m = 2, 6
    p = {
        "q": z["param.query_proj.query_mlps.0.weight"].T.reshape(-1, h, 8),
        "q_bias": z["param.query_proj.query_mlps.0.bias"].reshape(h, 8),
        "keys": z["param.keys"].reshape(h, 2, m, 4),
        "values": z["param.values.weight"],
    }
    if "param.gating.weight" in z:
        for name, of in (("gate", "swilu_projection"), ("o", "value_proj")):
            p |= {name: z[f"param.{of}.weight"].T, f"{name}_bias": z[f"param.{of}.bias"]}
        p |= {"open": z["param.gating.weight"][0], "open_bias": z["param.gating.bias"][0]}
    return p


@pytest.mark.parametrize(("name", "of"), [("product_keys", "look_up"), ("product_keys_plus", "layer")])
def test_official_numbers(name, of, monkeypatch):
    monkeypatch.setattr(product_keys, "BLOCK", 4)
    z = np.load(GOLDEN / f"{name}.npz")
    p = weights(z)
    y = jax.jit(getattr(product_keys, of), static_argnames="nearest")(p, z["x"], nearest=4)
    np.testing.assert_allclose(y, z["y"], atol=1e-5)
    q = jnp.einsum("btd,dhk->bthk", z["x"], p["q"]) + p["q_bias"][None, None]
    index, score = product_keys.find(q, p["keys"], 4)
    np.testing.assert_array_equal(index.reshape(10, 2, 4), z["indices"])
    np.testing.assert_allclose(score.reshape(10, 2, 4), z["scores"], atol=1e-5)
    every = np.add.outer(*(np.einsum("k,mk->m", q[1, 3, 1, i : i + 4], p["keys"][1, i // 4]) for i in (0, 4))).ravel()
    np.testing.assert_array_equal(np.argsort(-every)[:4], index[1, 3, 1])


def test_gradients_reach_what_was_read_and_nothing_else():
    z = np.load(GOLDEN / "product_keys_plus.npz")
    p, x = weights(z), z["x"][:1, :2]
    grads = jax.jit(jax.grad(lambda p: jnp.sin(product_keys.layer(p, x, 4)).sum()))(p)
    read = np.zeros(36, bool)
    read[np.asarray(z["indices"][:2]).ravel()] = True
    np.testing.assert_array_equal(np.abs(grads["values"]).max(1) > 0, read)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
