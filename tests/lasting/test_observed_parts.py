"""What entries receive while a part is read, where keys that no query sees are left out, next to all at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.kvcache import observe


@pytest.mark.parametrize("window", [None, 5])
def test_attention_and_what_is_received(window, monkeypatch):
    monkeypatch.setattr(observe, "ROWS", 2)
    rng, (b, h, g, t, s, k) = np.random.default_rng(0), (2, 2, 3, 9, 20, 4)
    q, keys, values = (rng.normal(size=x).astype(np.float32) for x in ((b, h, g, t, k), (b, h, s, k), (b, h, s, k)))
    # One row has all that is before it, the other nothing; both end with their own, and padding.
    at = np.stack([11 + np.arange(t), np.arange(t)])
    pos = np.stack([np.arange(s), np.append(np.full(11, -1), np.arange(t))])
    real = np.arange(t)[None] < np.array([[7], [9]])
    found = observe.attend_observed(*(jnp.asarray(x) for x in (q, at, real, keys, values, pos)), window)

    distance = at[:, :, None] - pos[:, None]
    seen = (pos >= 0)[:, None] & (distance >= 0) & (distance < (window or 99))
    scores = np.where(seen[:, None, None], np.einsum("bhgtk,bhsk->bhgts", q, keys) / 2, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    later = np.where(((distance > 0) & real[:, :, None])[:, None, None], weight, 0)
    wanted = np.einsum("bhgts,bhsk->bhgtk", weight, values), later.max((2, 3)), later.sum((2, 3))
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one, other, atol=1e-5)
