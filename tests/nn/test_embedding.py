"""Lookup in a table that is spread over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from atom_jax.nn.embedding import lookup
from atom_jax.sharding import MeshConfig, make_mesh, partition


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("vocab", [12, 13])
def test_spread_equals_whole(rows, vocab):
    """Rows or a vocabulary that the mesh does not divide, too; ids that occur often add up in the gradient."""
    table = jax.random.normal(jax.random.key(0), (vocab, 8))
    ids = jax.random.randint(jax.random.key(1), (rows, 6), 0, vocab)
    weights = jax.random.normal(jax.random.key(2), (rows, 6, 8))

    def loss(table, ids):
        x = lookup(table, ids, jnp.float32)
        return jnp.sum(x * weights), x

    gradient = jax.grad(loss, has_aux=True)
    expected, x = jnp.zeros_like(table).at[ids].add(weights), table[ids]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, partition(table.shape, ("vocab", "embed"), mesh))
        found, y = jax.jit(gradient, in_shardings=(place, None), out_shardings=(place, None))(table, ids)
    np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(expected, found, atol=1e-5)
