import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from atom_jax import params
from atom_jax.flax_bridge import LinenLM, NnxLM, from_linen, to_linen
from atom_jax.models import transformer
from atom_jax.typing import AtomError, Batch

CONFIG = transformer.TransformerConfig(
    family="qwen3", vocab_size=32, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 12)), jnp.int32)
BATCH = Batch(IDS, jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], (2, 12)), jnp.ones((2, 12), jnp.int32))


@pytest.fixture(scope="module")
def tree():
    return params.init(jax.random.key(0), transformer.spec(CONFIG))


@pytest.fixture(scope="module")
def expected(tree):
    return transformer.apply(tree, BATCH, cfg=CONFIG)[0].logits


def loss(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], IDS[:, 1:]).mean()


def test_linen_equals_the_functions(tree, expected):
    module = LinenLM(CONFIG)
    variables = to_linen(tree)
    chex.assert_trees_all_equal(from_linen(variables), tree)
    assert from_linen(variables)["embed"] is tree["embed"]
    chex.assert_trees_all_equal(module.apply(variables, IDS).logits, expected)
    chex.assert_trees_all_equal(module.apply(variables, BATCH).logits, expected)


def test_nnx_equals_the_functions(tree, expected):
    module = NnxLM(CONFIG, tree)
    chex.assert_trees_all_equal(module.tree(), tree)
    chex.assert_trees_all_equal(module(IDS).logits, expected)
    chex.assert_trees_all_equal(module(BATCH).logits, expected)
    graph, state = nnx.split(module)
    chex.assert_trees_all_equal(nnx.merge(graph, state)(IDS).logits, expected)
    assert len(jax.tree.leaves(nnx.state(module, nnx.Param))) == len(jax.tree.leaves(tree))


def test_padding_is_masked(tree, expected):
    mask = jnp.arange(12)[None] < jnp.array([[12], [7]])
    changed = IDS.at[1, 7:].set(0)
    for module in (LinenLM(CONFIG).bind(to_linen(tree)), NnxLM(CONFIG, tree)):
        logits = module(changed, mask).logits
        np.testing.assert_allclose(logits[0], expected[0], atol=1e-5)
        np.testing.assert_allclose(logits[1, :7], expected[1, :7], atol=1e-5)


def test_linen_init_has_the_same_shapes(tree):
    variables = LinenLM(CONFIG).init(jax.random.key(1), IDS)
    chex.assert_trees_all_equal_shapes_and_dtypes(from_linen(variables), tree)


def test_nnx_init_has_the_same_shapes(tree):
    chex.assert_trees_all_equal_shapes_and_dtypes(NnxLM(CONFIG, rngs=nnx.Rngs(0)).tree(), tree)


def test_gradients_are_those_of_the_functions(tree):
    def plain(p):
        return loss(transformer.apply(p, BATCH, cfg=CONFIG)[0].logits)

    wanted = jax.grad(plain)(tree)
    ours = jax.grad(lambda v: loss(LinenLM(CONFIG).apply(v, IDS).logits))(to_linen(tree))
    chex.assert_trees_all_close(from_linen(ours), wanted, atol=1e-6)
    state = nnx.grad(lambda module: loss(module(IDS).logits))(NnxLM(CONFIG, tree))
    chex.assert_trees_all_close(nnx.to_pure_dict(state)["lm"], wanted, atol=1e-6)


def test_linen_trains_inside_another_module(tree):
    class Scaled(linen.Module):
        @linen.compact
        def __call__(self, ids):
            return LinenLM(CONFIG)(ids).logits * self.param("scale", linen.initializers.ones, ())

    module, tx = Scaled(), optax.adam(1e-2)
    variables = module.init(jax.random.key(0), IDS)
    state = tx.init(variables)

    @jax.jit
    def step(variables, state):
        value, grads = jax.value_and_grad(lambda v: loss(module.apply(v, IDS)))(variables)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(variables, updates), state, value

    losses = []
    for _ in range(5):
        variables, state, value = step(variables, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]


def test_nnx_optimizer_trains(tree):
    module = NnxLM(CONFIG, tree)
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        value, grads = nnx.value_and_grad(lambda m: loss(m(IDS).logits))(module)
        optimizer.update(module, grads)
        return value

    losses = [float(step(module, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    # What was trained goes back to the functions.
    logits = transformer.apply(module.tree(), BATCH, cfg=CONFIG)[0].logits
    np.testing.assert_allclose(logits, module(IDS).logits, atol=1e-5)


def test_wrong_parameters(tree):
    with pytest.raises(AtomError, match="names and shapes"):
        NnxLM(CONFIG, {"embed": tree["embed"]})
    with pytest.raises(AtomError, match="needs parameters"):
        NnxLM(CONFIG)
    with pytest.raises(AtomError, match="not a LinenLM's"):
        from_linen({"params": {}})
