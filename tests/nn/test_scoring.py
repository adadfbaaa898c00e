"""One scorer over blocks of positions: every statistic next to its definition, whole and in blocks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.nn import scoring
from atom_jax.sharding import MeshConfig, make_mesh

B, T, D, V = 2, 12, 8, 30
AMONG = (3, 7, 29)


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 5)
    x, y = (jax.random.normal(k, (B, T, D)) for k in keys[:2])
    w, u = (jax.random.normal(k, (D, V)) for k in keys[2:4])
    return x, y, w, u, jax.random.randint(keys[4], (B, T), 0, V)


def head(w, x_btd):
    return jnp.einsum("btd,dv->btv", x_btd, w)


def everything(case, block=None):
    x, y, w, u, targets = case
    teacher = functools.partial(head, u), y
    return scoring.score(
        functools.partial(head, w), x, targets, tuple(scoring.STATISTICS), teacher=teacher, among=AMONG, block=block
    )


def test_statistics_are_what_they_are_called(case):
    x, y, w, u, targets = (np.asarray(a, np.float64) for a in case)
    targets = targets.astype(int)
    logits = x @ w
    log_z = np.log(np.exp(logits).sum(-1))
    logp = logits - log_z[..., None]
    theirs = y @ u - np.log(np.exp(y @ u).sum(-1))[..., None]
    expected = {
        "nats": -np.take_along_axis(logp, targets[..., None], 2)[..., 0],
        "log_z": log_z,
        "entropy": -(np.exp(logp) * logp).sum(-1),
        "hit": logits.argmax(-1) == targets,
        "among": np.log(np.exp(logp[..., AMONG]).sum(-1)),
        "reverse": (np.exp(logp) * (logp - theirs)).sum(-1),
        "forward": (np.exp(theirs) * (theirs - logp)).sum(-1),
        "agree": logits.argmax(-1) == theirs.argmax(-1),
    }
    found = everything(case)
    assert found.keys() == expected.keys() == scoring.STATISTICS.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-5, err_msg=name)
        assert found[name].dtype == (bool if value.dtype == bool else jnp.float32)


@pytest.mark.parametrize("block", [1, 5, 6, 12, 40])
def test_blocks_change_nothing(case, block):
    chex.assert_trees_all_close(everything(case, block), everything(case), rtol=1e-5, atol=1e-5)


def test_gradients_in_blocks_equal_those_of_the_whole(case):
    x, y, w, u, targets = case

    def total(w, x, block):
        teacher = functools.partial(head, u), y
        want = ("nats", "log_z", "entropy", "reverse", "forward", "among")
        found = scoring.score(functools.partial(head, w), x, targets, want, teacher=teacher, among=AMONG, block=block)
        return sum(jnp.sum(a) for a in found.values())

    whole, cut = (jax.grad(total, (0, 1))(w, x, block) for block in (None, 5))
    chex.assert_trees_all_close(cut, whole, rtol=1e-4, atol=1e-4)


def test_logits_of_all_positions_never_exist_together(case, monkeypatch):
    x, _, w, _, targets = case
    monkeypatch.setattr(scoring, "LIMIT", 3 * B * V)
    total = lambda w: jnp.sum(scoring.score(functools.partial(head, w), x, targets)["nats"])  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(total))(w))
    assert f"f32[{B},3,{V}]" in text
    # Nor as residuals of the scan, one block after the other.
    assert f"[{B},{T},{V}]" not in text and f"[{T // 3},{B},3,{V}]" not in text


@pytest.mark.parametrize("block", [None, 4, 6])
def test_positions_spread_over_devices(case, block):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(everything, block=block))(case)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(everything(case)), rtol=1e-5, atol=1e-5)
