"""Dynamic pooling's predictors against the official code, and MAGNET's per-script ones against single ones."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax import params
from atom_jax.chunking.rules import predictor
from atom_jax.chunking.rules.predictor import Predictor
from atom_jax.chunking.types import Seen
from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError

MLP = "w.boundary_predictor.boundary_predictor"


@pytest.fixture(scope="module")
def official(golden):
    return load_file(golden / "dynpool" / "dynpool.safetensors")


@pytest.fixture(scope="module")
def weights(official):
    return {
        "hidden": official[f"{MLP}.0.weight"].T[None],
        "hidden_bias": official[f"{MLP}.0.bias"][None],
        "out": official[f"{MLP}.2.weight"],
        "out_bias": official[f"{MLP}.2.bias"],
    }


@pytest.fixture(scope="module")
def states(official):
    return official["gumbel.hidden_pre"].transpose(1, 0, 2)


def whole(b, t):
    return Tokens(np.tile(np.arange(t, dtype=np.int32), (b, 1)), np.ones((b, t), np.int32))


@functools.partial(jax.jit, static_argnames="cfg")
def predict(p, h, cfg, **kwargs):
    seen = Seen(h, whole(*h.shape[:2]), **kwargs)
    return predictor.apply(p, seen, predictor.init_state(cfg, h.shape[-1], h.shape[0]), cfg=cfg)[0]


def test_spec_has_the_official_shapes(weights, states):
    made = params.init(jax.random.key(0), predictor.spec(Predictor(calibrated=False), states.shape[-1]))
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in weights.items()}


def test_gumbel_with_the_official_noise(official, weights, states):
    logit = predict(weights, states, Predictor(calibrated=False)).logit
    soft = predictor.relax(logit, official["gumbel.uniform"], 0.5)
    np.testing.assert_allclose(soft, official["gumbel.soft"], atol=2e-6)
    np.testing.assert_array_equal(soft > 0.5, official["gumbel.hard"] > 0)
    real, script = np.ones(soft.shape, bool), np.zeros(soft.shape, np.int32)
    loss = predictor.binomial_loss(jnp.asarray(official["gumbel.hard"]), real, script, (0.2,))
    np.testing.assert_allclose(loss, official["gumbel.loss_boundaries"], rtol=1e-5)


def test_gumbel_noise_needs_a_key(weights, states):
    cfg = Predictor(calibrated=False)
    quiet = predict(weights, states, cfg)
    np.testing.assert_array_equal(quiet.mark, quiet.p > 0.5)
    runs = [predict(weights, states, cfg, key=jax.random.key(i)) for i in range(2)]
    assert (np.asarray(runs[0].mark) != np.asarray(runs[1].mark)).any()
    for run in runs:
        np.testing.assert_array_equal(run.hard, run.mark)
        np.testing.assert_array_equal(run.p, quiet.p)


def test_straight_through_gradient_is_the_relaxed_one():
    logit = jnp.linspace(-2.0, 2.0, 8)[None]
    p = {"hidden": jnp.zeros((1, 1, 1)), "hidden_bias": jnp.zeros((1, 1)), "out": jnp.zeros((1, 1))}
    h = jnp.zeros((1, 8, 1))

    def hard(bias):
        return predict(p | {"out_bias": bias}, h, Predictor(calibrated=False)).hard.sum()

    grads = jax.jit(jax.vmap(jax.grad(hard)))(logit[0][:, None])[:, 0]
    soft = jax.nn.sigmoid(logit[0] / 0.5)
    np.testing.assert_allclose(grads, 8 * soft * (1 - soft) / 0.5, rtol=1e-5)


def test_the_threshold_learns_each_scripts_share_of_marks():
    """By gradient descent on the rule's own loss, from random states; noise and probabilities stay as they were."""
    cfg = Predictor(scripts=("latin", "cyrillic"), priors=(0.3, 0.1))
    p = params.init(jax.random.key(1), predictor.spec(cfg, 4))
    p |= {name: 60 * p[name] for name in ("hidden", "out")}
    ids = np.frombuffer(("ab д" * 400).encode(), np.uint8).astype(np.int32)[None]
    h = jax.random.normal(jax.random.key(2), (1, ids.shape[1], 4))

    @jax.jit
    def slope(threshold):
        return jax.grad(lambda x: predict(p | {"threshold": x}, h, cfg, ids=ids).loss)(threshold)

    threshold = p["threshold"]
    for i in range(200):
        threshold -= 20.0 / (1 + i / 4) * slope(threshold)
    before, after = (predict(p | {"threshold": x}, h, cfg, ids=ids) for x in (p["threshold"], threshold))
    np.testing.assert_array_equal(before.p, after.p)
    latin = np.arange(ids.shape[1]) % 5 < 3
    for rate, mine in zip(cfg.priors, (latin, ~latin)):
        assert abs(np.asarray(after.mark)[0, mine].mean() - rate) < 0.01
        assert abs(np.asarray(before.mark)[0, mine].mean() - rate) > 0.02
    noisy = [
        predict(p | {"threshold": x}, h, cfg, ids=ids, key=jax.random.key(3)).mark for x in (0 * threshold, threshold)
    ]
    np.testing.assert_array_equal(*noisy)


def test_supervised_by_marks(official, weights, states):
    cfg = Predictor(supervision="marks", double_sigmoid=True)
    out = predict(weights, states, cfg, marks=official["unigram.boundaries_gt"].T)
    np.testing.assert_allclose(out.loss, official["unigram.loss_boundaries"], rtol=1e-5)
    np.testing.assert_allclose(out.mark.mean(), official["unigram.p_ones"], rtol=1e-6)
    assert out.hard is None
    plain = predict(weights, states, Predictor(supervision="marks"), marks=official["unigram.boundaries_gt"].T)
    pi, y = np.asarray(plain.p), official["unigram.boundaries_gt"].T
    np.testing.assert_allclose(plain.loss, -np.where(y, np.log(pi), np.log(1 - pi)).mean(), rtol=1e-5)


def test_marks_are_needed_while_training_only(weights, states):
    cfg = Predictor(supervision="marks")
    assert predict(weights, states, cfg).loss == 0
    with pytest.raises(AtomError, match="needs unit ends from the data"):
        predict(weights, states, cfg, key=jax.random.key(0))


def test_supervised_by_entropy_spikes(official, weights, states):
    cfg = Predictor(supervision="entropy", double_sigmoid=True)
    out = predict(weights, states, cfg)
    assert out.loss == 0
    entropy, tokens = official["entropy.entropy"].T, whole(*states.shape[:2])
    np.testing.assert_array_equal(predictor.spikes(entropy, tokens), official["entropy.spikes"].T)
    loss = predictor.late_loss(out, entropy, tokens, cfg=cfg)
    np.testing.assert_allclose(loss, official["entropy.loss_boundaries"], rtol=1e-5)


def test_spikes_of_packed_documents_are_their_own(official):
    entropy = official["entropy.entropy"].T
    n = entropy.shape[1]
    positions = np.tile(np.arange(n, dtype=np.int32), 2)[None]
    segments = np.repeat([1, 2], n)[None].astype(np.int32)
    spikes = predictor.spikes(entropy.reshape(1, -1), Tokens(positions, segments))
    np.testing.assert_array_equal(spikes.reshape(2, n), official["entropy.spikes"].T)


def test_binomial_loss_counts_real_positions():
    """Rows of 6 and 3 real positions with 2 and 3 marks, and one of padding."""
    real = np.array([[1] * 6, [1] * 3 + [0] * 3, [0] * 6], bool)
    hard = np.array([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0] * 6], np.float32)
    loss = predictor.binomial_loss(hard, real, np.zeros((3, 6), np.int32), (0.3,))
    rows = [math.log(math.comb(6, 2) * 0.3**2 * 0.7**4) / 6, math.log(0.3**3) / 3]
    np.testing.assert_allclose(loss, -sum(rows) / 2, rtol=1e-5)


def test_binomial_loss_per_script():
    hard = np.array([[1, 0, 0, 1, 1, 0]], np.float32)
    script = np.array([[0, 0, 0, 0, 1, 1]], np.int32)
    loss = predictor.binomial_loss(hard, np.ones((1, 6), bool), script, (0.3, 0.1))
    expected = math.log(math.comb(4, 2) * 0.3**2 * 0.7**2) + math.log(2 * 0.1 * 0.9)
    np.testing.assert_allclose(loss, -expected / 6, rtol=1e-5)


def test_each_script_has_its_own_predictor():
    cfg = Predictor(scripts=("latin", "cyrillic"), priors=(0.2, 0.1))
    p = params.init(jax.random.key(1), predictor.spec(cfg, 4))
    np.testing.assert_allclose(jax.nn.sigmoid(p["out_bias"]), [0.2, 0.1], rtol=1e-6)
    ids = np.frombuffer("ab д, c".encode(), np.uint8).astype(np.int32)[None]
    h = jax.random.normal(jax.random.key(2), (1, ids.shape[1], 4))
    out = predict(p, h, cfg, ids=ids)
    script = np.array([0, 0, 0, 1, 1, 1, 1, 0])
    for i in (0, 1):
        alone = predict(jax.tree.map(lambda x, i=i: x[i : i + 1], p), h, Predictor())
        np.testing.assert_allclose(out.logit[0, script == i], alone.logit[0, script == i], atol=1e-6)


def test_sums_over_long_rows_keep_their_precision():
    """The log-gamma function of counts in the thousands has errors far below the loss."""
    n, k = 8192, 1800
    hard = (np.arange(n) < k).astype(np.float32)[None]
    loss = predictor.binomial_loss(hard, np.ones((1, n), bool), np.zeros((1, n), np.int32), (0.2,))
    exact = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(0.2)
    np.testing.assert_allclose(loss, -(exact + (n - k) * math.log(0.8)) / n, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"supervision": "none"}, "supervision: expected gumbel"),
        ({"prior": 1.0}, "prior: expected a rate between 0 and 1"),
        ({"temperature": 0.0}, "temperature: expected more than 0"),
        ({"scripts": ("latin",)}, "priors: expected one for each of 1 scripts"),
        ({"scripts": ("elvish",), "priors": (0.1,)}, "unknown script 'elvish'"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(AtomError, match=sentence):
        Predictor(**options)
