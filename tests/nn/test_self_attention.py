"""Attention spread over a mesh equals attention on one device, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.nn.attention import Tokens, attend
from atom_jax.nn.self_attention import Newest, self_attend
from atom_jax.sharding import MeshConfig, make_mesh


def inputs(t: int):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 2, 2, t, 8))
    k, v = (jax.random.normal(key, (2, 2, t, 8)) for key in keys[1:3])
    keep = -jnp.abs(jax.random.normal(keys[3], (2, 2, t)))
    # Three documents and padding in the first row, one document in the second.
    cuts = np.array([t // 3, t // 2, t - 5])
    segments = np.stack([np.searchsorted(cuts, np.arange(t), side="right") + 1, np.ones(t, int)])
    starts = np.concatenate([[0], cuts])[segments[0] - 1]
    positions = np.stack([np.arange(t) - starts, np.arange(t)])
    segments[0, cuts[-1] :] = 0
    return q, k, v, keep, Tokens(jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32))


# 320 positions make blocks of 64, pieces of 40 that start inside of them, and a single tile for every piece of 16.
@pytest.mark.parametrize("t, window, kept", [(320, None, True), (320, 50, False), (64, None, True), (60, None, True)])
@pytest.mark.parametrize("sizes", [{"context": 4, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_spread_equals_whole(t, window, kept, sizes):
    q, k, v, keep, tokens = inputs(t)
    keep = keep if kept else None
    real = (tokens.segments > 0)[:, None, None, :, None]

    def loss(q, k, v, keep, spread):
        if spread:
            out = self_attend(q, k, v, tokens, window=window, keep_bht=keep, keep_window=20)
        else:
            out = attend(q, k, v, tokens, tokens, window=window, aligned=True, keep_bhs=keep, keep_window=20)
        return jnp.sum(jnp.where(real, jnp.sin(out), 0.0)), out

    def run(spread):
        gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3) if kept else (0, 1, 2), has_aux=True)
        return jax.jit(gradient, static_argnums=4)(q, k, v, keep, spread)

    (_, expected), slopes = run(False)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, **sizes), jax.devices()[: int(np.prod(list(sizes.values())))])):
        (_, found), gradients = run(True)
    np.testing.assert_allclose(jnp.where(real, found, 0), jnp.where(real, expected, 0), atol=1e-5)
    for a, b in zip(gradients, slopes):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_the_newest_places_have_other_keys(sizes):
    """Next to one softmax over both kinds of keys under dense masks, forward and backward."""
    t, window = 90, 7
    q, k, v, keep, tokens = inputs(t)
    k_new, v_new, bias = k[..., ::-1] + 0.1, 2 * v, jnp.roll(keep, 3, axis=2)
    real = (tokens.segments > 0)[:, None, None, :, None]
    distance = tokens.positions[:, :, None] - tokens.positions[:, None]
    same = (tokens.segments[:, :, None] == tokens.segments[:, None]) & (distance >= 0)
    near, far = ((same & x)[:, None, None] for x in (distance < window, distance >= window))
    later = (distance > window)[:, None, None]

    def dense(q, k, v, keep, bias, k_new, v_new):
        scores = lambda k: jnp.einsum("bhgtk,bhsk->bhgts", q, k) * q.shape[-1] ** -0.5  # noqa: E731
        old = scores(k) + bias[:, :, None, None] + jnp.where(later, keep[:, :, None, None], 0.0)
        both = [jnp.where(near, scores(k_new), -1e30), jnp.where(far, old, -1e30)]
        return jax.nn.softmax(jnp.concatenate(both, axis=-1)) @ jnp.concatenate([v_new, v], axis=2)[:, :, None]

    def ours(q, k, v, keep, bias, k_new, v_new):
        return self_attend(q, k, v, tokens, keep_bht=keep, bias_bht=bias, newest=Newest(k_new, v_new, window))

    def run(form):
        def loss(*args):
            return jnp.sum(jnp.where(real, jnp.sin(form(*args)), 0.0))

        return jax.jit(jax.value_and_grad(loss, argnums=range(7)))(q, k, v, keep, bias, k_new, v_new)

    expected, slopes = run(dense)
    if sizes is None:
        found, gradients = run(ours)
    else:
        with jax.set_mesh(make_mesh(MeshConfig(data=1, **sizes), jax.devices()[:8])):
            found, gradients = run(ours)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(gradients, slopes):
        np.testing.assert_allclose(a, b, atol=1e-5)
