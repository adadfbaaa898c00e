import chex
import jax
import jax.numpy as jnp
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
