"""Layers of a vision transformer with reducers between their halves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params, reduction
from atom_jax.nn import vit
from atom_jax.reduction.blocks import blocks, received
from atom_jax.reduction.globalcom2 import GlobalCom2
from atom_jax.reduction.todre import ToDRE
from atom_jax.reduction.tome import ToMe
from atom_jax.typing import AtomError

EPS = 1e-6


@pytest.fixture(scope="module")
def layers():
    p = params.init(jax.random.key(0), params.stack(vit.block_spec(8, 12, 2), 3))
    return p, jax.random.normal(jax.random.key(1), (2, 16, 8))


def test_merging_equals_loses_nothing(layers):
    p, x = layers

    @jax.jit
    def run(p, x):
        found = blocks(p, x, (ToMe(8), None, None), EPS)
        return found.size, reduction.expand(found.x, found.trace), vit.blocks(p, x, vit.everywhere(2, 16), EPS)

    size, merged, whole = run(p, jnp.repeat(x[:, :8], 2, axis=1))
    assert (size == 2).all()
    np.testing.assert_allclose(merged, whole, atol=1e-5)


def test_pruned_is_as_if_they_had_never_been(layers):
    p, x = layers

    @jax.jit
    def run(p, x):
        found = blocks(p, x, (ToDRE(5), None, None), EPS)
        first, rest = jax.tree.map(lambda w: w[0], p), jax.tree.map(lambda w: w[1:], p)
        mixed = vit.mixed(first, x, vit.everywhere(2, 16), EPS)
        kept = jnp.take_along_axis(mixed.x, found.trace.at[..., None], axis=1)
        return found.x, vit.blocks(rest, vit.fed(first, kept, EPS), vit.everywhere(2, 5), EPS)

    np.testing.assert_allclose(*run(p, x), atol=1e-5)


def test_unused_slots_change_nothing(layers):
    p, x = layers

    @jax.jit
    def run(p, x):
        found = blocks(p, x, (GlobalCom2(0.45), ToDRE(4), None), EPS, grid=(4, 4))
        return blocks(p, x, (GlobalCom2(0.45), None, None), EPS, grid=(4, 4)), found

    one, two = run(p, x)
    # Of 16 tokens 7 may stay, but no crop of 4 keeps more than one or two.
    assert one.size.shape == (2, 7) and (one.size.sum(1) < 7).all() and two.size.shape == (2, 4)
    for row in range(2):
        used = np.flatnonzero(one.size[row])
        slots = np.asarray(one.trace.at[row, used])
        assert len(set(slots)) == len(used)
    assert jnp.isfinite(one.x).all() and jnp.isfinite(two.x).all()


def test_attention_received_adds_up(layers):
    p, x = layers
    mixed = vit.mixed(jax.tree.map(lambda w: w[0], p), x, vit.everywhere(2, 16), EPS)
    found = received(mixed.q, mixed.k, jnp.zeros((2, 16)).at[:, 3].set(-1e9))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    assert (found[:, 3] == 0).all()


def test_a_reducer_for_every_layer(layers):
    p, x = layers
    with pytest.raises(AtomError, match="reducers: there are 2 for 3 layers"):
        blocks(p, x, (None, None), EPS)
