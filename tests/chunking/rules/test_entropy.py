"""BLT's rules against the published units. Thresholds lie between the entropies that end one and the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax import params
from atom_jax.chunking.bytemodel import ByteModel
from atom_jax.chunking.rules import entropy
from atom_jax.chunking.rules.entropy import Entropy, MarksState
from atom_jax.chunking.types import Seen
from atom_jax.nn import scoring
from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError

RULES = {
    "glob": Entropy(threshold=4.1),
    "mono": Entropy(mode="monotonic", increase=0.3),
    "both": Entropy(mode="both", threshold=3.0, increase=0.3),
}


@pytest.fixture(scope="module")
def official(golden):
    return load_file(golden / "blt" / "blt.safetensors")


def whole(t):
    return Tokens(np.arange(t, dtype=np.int32)[None], np.ones((1, t), np.int32))


def starts(ends):
    """Published layout: where units start among t + 1 positions, given ends at t."""
    return np.concatenate([[0], 1 + np.flatnonzero(ends)])


def ends_of(official, cfg):
    h = official["entropies"]
    return np.asarray(entropy.marks(jnp.asarray(h), whole(h.shape[1]), MarksState.empty(1), cfg)[0])


@pytest.mark.parametrize("name", RULES)
def test_unit_starts_and_lengths(official, name):
    found = starts(ends_of(official, RULES[name])[0])
    np.testing.assert_array_equal(found, official[f"{name}.start_ids"][0])
    lengths = np.diff(np.append(found, official["entropies"].shape[1] + 1))
    np.testing.assert_array_equal(lengths, official[f"{name}.lengths"][0])


@pytest.mark.parametrize("mode", ["monotonic", "both"])
def test_rounding_makes_no_unit(mode):
    """Where the same bytes follow each other, entropies differ by rounding alone, and otherwise in every reading."""
    h = jnp.array([[1.0, 2.0, 2.0, 2.000002, 2.000001, 2.000003, 2.01]])
    found, _ = entropy.marks(h, whole(7), MarksState.empty(1), Entropy(mode=mode, threshold=0.5))
    np.testing.assert_array_equal(found[0], [True, True, False, False, False, False, True])


def test_unit_of_each_byte(official):
    """The unit that byte t is in, and the one that it reads while predicting byte t + 1."""
    ends = ends_of(official, RULES["glob"])
    done = np.cumsum(ends, axis=1)
    np.testing.assert_array_equal(done - ends, official["glob.patch_ids"])
    np.testing.assert_array_equal(done - 1, official["glob.decoder_patch_ids"])


def test_entropy_of_logits(official):
    """The rule's own formula, on the published logits."""
    log = jax.nn.log_softmax(jnp.asarray(official["entropy_logits"]))
    np.testing.assert_allclose(scoring.entropy(log), official["entropies"], rtol=2e-6)


def test_long_units_are_cut(official):
    plain = ends_of(official, RULES["glob"])[0]
    cut = ends_of(official, Entropy(threshold=4.1, max_length=2))[0]
    edges = starts(plain)
    expected = [s + i for s, e in zip(edges, [*edges[1:], 41]) for i in range(0, e - s, 2)]
    np.testing.assert_array_equal(starts(cut), [s for s in expected if s <= 40])
    assert np.diff(starts(cut)).max() == 2


def test_the_entropy_model_learns_and_nothing_else_does():
    small = ByteModel(d_model=16, n_layers=1, n_heads=2, d_ff=16, window=4)
    ids = jnp.asarray(np.tile([97, 98, 99, 32], 6)[None])
    h = jax.random.normal(jax.random.key(1), (1, 24, 4))

    def loss(p, h, weight):
        cfg = Entropy(model=small, weight=weight)
        seen = Seen(h, whole(24), ids)
        return entropy.apply(p, seen, entropy.init_state(cfg, 4, 1), cfg=cfg)[0].loss

    p = params.init(jax.random.key(0), entropy.spec(Entropy(model=small), 4))
    slope = jax.value_and_grad(loss, argnums=(0, 1))

    @functools.partial(jax.jit, static_argnames="weight")
    def step(p, rate, weight):
        value, (of_p, of_h) = slope(p, h, weight)
        return value, jax.tree.map(lambda x, g: x - rate * g, p, of_p), (of_p, of_h)

    first = step(p, 0.3, weight=1.0)[0]
    assert first == pytest.approx(np.log(264), rel=0.2)
    for _ in range(60):
        _, p, (_, of_h) = step(p, 0.3, weight=1.0)
    assert step(p, 0.3, weight=1.0)[0] < 0.3 * first
    assert not np.asarray(of_h).any()
    frozen = step(p, 0.3, weight=0.0)[2]
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(frozen))


def test_bad_options():
    with pytest.raises(AtomError, match="mode: expected global"):
        Entropy(mode="top")
    with pytest.raises(AtomError, match="max_length: expected a whole number from 0"):
        Entropy(max_length=-1)
    with pytest.raises(AtomError, match="even number of channels for 3 heads"):
        ByteModel(d_model=64, n_heads=3)
    with pytest.raises(AtomError, match="window: expected a whole number from 1"):
        ByteModel(window=0)
