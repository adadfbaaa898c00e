"""Stacks of layers of several kinds, taken apart into runs and scanned or unrolled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.kvcache import memory
from atom_jax.kvcache.memory import Memory, Stack
from atom_jax.models import layers


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("ffff", [(0, 1, 4)]),
        ("ssfssf", [(0, 3, 2)]),
        ("sfsfsf", [(0, 2, 3)]),
        ("nnffff", [(0, 1, 2), (2, 1, 4)]),
        ("nssfsssfsssf", [(0, 1, 1), (1, 4, 2), (9, 1, 2), (11, 1, 1)]),
        ("sf", [(0, 1, 1), (1, 1, 1)]),
        ("abcdefghi" * 2, [(i, 1, 1) for i in range(18)]),
        ("", []),
    ],
)
def test_runs_repeat_a_short_period(kinds, expected):
    assert [tuple(run) for run in layers.runs(tuple(kinds))] == expected


@pytest.mark.parametrize("kinds", ["aaaa", "aabaab", "abbbb", "abcabcaab", "a"])
@pytest.mark.parametrize("unroll", [False, True])
def test_every_layer_has_its_parameters_its_memory_and_its_turn(kinds, unroll):
    kinds, n = tuple(kinds), len(kinds)
    weights = {"w": jnp.arange(1.0, n + 1)}
    states = layers.states(kinds, lambda kind, numbers: Stack(jnp.array(numbers)[:, None] * jnp.ones((1, 2))))

    def layer(kind, p, x, state, other):
        report = {"square": jnp.square(other)} if kind == "a" else {}
        return 3 * x + p["w"] + ord(kind), (None if state is None else state + 10 * other), report

    def lay(kind, p):
        return {"w": 2 * p["w"]}

    laid_out = layers.laid_out(kinds, weights, lay, unroll)
    if unroll:
        states = memory.unstack(Memory(states, jnp.zeros(2, jnp.int32))).layers
    for p, factor in ((weights, 1), (laid_out, 2)):
        if unroll and factor == 1:
            continue
        run = jax.jit(lambda p, states, x: layers.run_layers(layer, kinds, p, x, states, jnp.arange(n)))
        x, new, said = run(p, states, jnp.zeros(2))
        expected = 0.0
        for i, kind in enumerate(kinds):
            expected = 3 * expected + factor * (i + 1) + ord(kind)
        np.testing.assert_allclose(x, [expected] * 2)
        assert jax.tree.structure(new) == jax.tree.structure(states)
        jax.tree.map(lambda old, new: np.testing.assert_array_equal(new, 11 * old), states, new)
        np.testing.assert_array_equal(said["square"], [i * i for i, kind in enumerate(kinds) if kind == "a"])


def test_compiled_programs_do_not_grow_with_repeats():
    def size(n):
        kinds = ("s", "s", "f") * n
        layer = lambda kind, p, x, state, other: (x * p + (kind == "f"), None, {})  # noqa: E731
        run = jax.jit(lambda p: layers.run_layers(layer, kinds, p, jnp.ones(3), None)[0])
        return len(run.lower(jnp.ones(3 * n)).as_text().splitlines())

    assert size(20) <= size(2)
