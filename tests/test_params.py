import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from atom_jax import params, sharding
from atom_jax.params import ParamSpec
from atom_jax.typing import AtomError

SPEC = {
    "embed": ParamSpec((16, 8), ("vocab", "embed"), params.normal(0.02)),
    "layers": params.stack({"w": ParamSpec((8, 6, 4), ("embed", "heads", None), params.normal(1.0))}, 3),
}


def test_one_description_gives_shapes_values_and_counts():
    tree = params.init(jax.random.key(0), SPEC)
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, params.abstract(SPEC))
    assert params.count(SPEC) == params.count(tree) == 16 * 8 + 3 * 8 * 6 * 4
    assert params.nbytes(params.abstract(SPEC, jnp.bfloat16)) == 2 * params.count(SPEC)
    assert params.flatten(SPEC)["layers/w"].axes == ("layers", "embed", "heads", None)
    chex.assert_trees_all_equal(params.unflatten(params.flatten(tree)), tree)


def test_a_new_parameter_leaves_the_others_as_they_were():
    more = {**SPEC, "added": ParamSpec((4,), (None,), params.ones)}
    old, new = params.init(jax.random.key(1), SPEC), params.init(jax.random.key(1), more)
    new.pop("added")
    chex.assert_trees_all_equal(old, new)


def test_rules_place_axes_and_drop_those_that_do_not_divide():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=2, tensor=4))
    place = jax.tree.map(lambda s: s.spec, sharding.shardings(SPEC, mesh))
    assert place["embed"] == P("tensor", "fsdp")
    assert place["layers"]["w"] == P(None, "fsdp", None, None)
    assert sharding.partition((8, 8), ("batch", "embed"), mesh) == P("fsdp", None)
    both = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))
    assert sharding.partition((8, 2), ("batch", None), both) == P(("data", "fsdp"), None)


def test_sharded_initial_values_equal_unsharded_ones():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    sharded = jax.jit(lambda k: params.init(k, SPEC), out_shardings=sharding.shardings(SPEC, mesh))(jax.random.key(3))
    chex.assert_trees_all_equal(
        jax.device_get(sharded), jax.device_get(jax.jit(lambda k: params.init(k, SPEC))(jax.random.key(3)))
    )


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(AtomError, match="does not fit 8 devices"):
        sharding.make_mesh(sharding.MeshConfig(data=3))


def fake_mesh(processes: list[int], **sizes: int):
    """A mesh whose devices belong to these processes, in order."""
    devices = np.array([types.SimpleNamespace(process_index=p) for p in processes])
    return types.SimpleNamespace(devices=devices.reshape(tuple(sizes.values())), shape=sizes)


def test_processes_supply_the_rows_of_their_devices():
    rows = fake_mesh([0, 0, 1, 1, 2, 2, 3, 3], data=4, fsdp=2, context=1, tensor=1)
    assert [sharding.row_share(rows, p) for p in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    # Two processes share the heads, or the positions, of the same rows.
    shared = fake_mesh([0, 0, 1, 1, 2, 2, 3, 3], data=1, fsdp=2, context=2, tensor=2)
    assert [sharding.row_share(shared, p) for p in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    with pytest.raises(AtomError, match="cannot be divided among 2 processes"):
        sharding.row_share(fake_mesh([0, 0, 0, 0, 1, 1], data=1, fsdp=3, context=1, tensor=2), 0)
    with pytest.raises(AtomError, match="cannot be divided"):
        sharding.row_share(fake_mesh([0, 0, 0, 1, 1, 1], data=1, fsdp=3, context=1, tensor=2), 0)
