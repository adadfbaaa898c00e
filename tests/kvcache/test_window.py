"""The ring of a sliding layer next to a dense cache with the same window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.layer import Call
from atom_jax.kvcache.window import WindowLayer
from atom_jax.nn.attention import Tokens

B, H, G, K, WINDOW = 3, 2, 2, 8, 5


def call(at, length_b, counts, fresh=False):
    """A Call of as many tokens as the longest row gets, random but the same for the same position."""
    t = max(counts)
    keys = jax.random.split(jax.random.key(at), 3)
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(
        keys, [(B, H, G, t, K), (B, H, t, K), (B, H, t, K)],
    ))  # fmt: skip
    offsets = jnp.arange(t)[None]
    segments = (offsets < jnp.array(counts)[:, None]).astype(jnp.int32)
    return Call(q, k, v, Tokens(length_b[:, None] + offsets, segments), length_b, window=WINDOW, fresh=fresh)


@pytest.mark.parametrize("parts", [
    [(3, 3, 2), (1, 1, 1), (1, 0, 1), (1, 1, 1), (1, 1, 1)],
    [(9, 1, 6), (1, 1, 1), (1, 1, 1), (0, 1, 1), (1, 1, 0), (1, 1, 1), (1, 1, 1)],
    [(1, 1, 1)] * 13,
    [(4, 2, 5), (3, 7, 1), (1, 1, 1), (2, 0, 12), (1, 1, 1)],
], ids=["short", "long", "alone", "parts"])  # fmt: skip
def test_a_ring_gives_what_a_dense_cache_gives(parts):
    dense = DenseLayer.empty(B, H, 40, K, jnp.float32)
    ring = WindowLayer.empty(B, H, 40, K, jnp.float32, WINDOW)
    assert ring.k.shape == (B, H, WINDOW, K)
    length = jnp.zeros(B, jnp.int32)
    for i, counts in enumerate(parts):
        one = call(i, length, counts, fresh=i == 0)
        (expected, dense), (got, ring) = dense.extend(one), ring.extend(one)
        real = np.broadcast_to(np.asarray(one.real)[:, None, None], expected.shape[:-1])
        np.testing.assert_allclose(np.asarray(got)[real], np.asarray(expected)[real], atol=1e-6)
        length = one.after
        assert not ring.full(length).any()
        np.testing.assert_array_equal(ring.held(length)[:, 0], np.minimum(length, WINDOW))


def test_a_ring_grows_up_to_the_window():
    window = 20
    ring = WindowLayer.empty(B, H, 4, K, jnp.float32, window)
    whole = WindowLayer.empty(B, H, 64, K, jnp.float32, window)
    length, sizes = jnp.zeros(B, jnp.int32), []
    for i in range(30):
        one = call(i, length, (1, 1, 1)).replace(window=window)
        if ring.full(length).any():
            ring = ring.grow(length, 1)
        sizes.append(ring.k.shape[2])
        (got, ring), (expected, whole) = ring.extend(one), whole.extend(one)
        np.testing.assert_allclose(got, expected, atol=1e-6)
        length = one.after
    assert sorted(set(sizes)) == [4, 16, 20]


def test_what_is_written_past_the_end_is_lost():
    """Rows that are done are computed along; they must not change what others, or they themselves, hold."""
    ring = WindowLayer.empty(B, H, 4, K, jnp.float32, 20)
    _, ring = ring.extend(call(0, jnp.zeros(B, jnp.int32), (4, 4, 4), fresh=True).replace(window=20))
    _, after = ring.extend(call(1, jnp.full(B, 4), (1, 1, 1)).replace(window=20))
    np.testing.assert_array_equal(after.k, ring.k)
