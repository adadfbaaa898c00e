"""Attention to paged, ragged caches against softmax over what every row holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cache_attention import kernel, ref
from pallas_kernels.cache_attention.api import cache_attention, in_pages
from tests.pallas_kernels.simulated import run

B, H, G, N, C, K = 2, 3, 4, 5, 32, 16
LENGTHS = jnp.asarray([[0, 1, N * C], [C, C + 1, 0]], jnp.int32)
attend = jax.jit(cache_attention, static_argnames="implementation")


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    """Two pages per step, so that rows take several."""
    monkeypatch.setattr(kernel, "ENTRIES", 2 * C)


@functools.cache
def cache(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (B, H, G, K)).astype(dtype)
    k, v = (jax.random.normal(key, (B * H * N, C, K)).astype(dtype) for key in keys[1:])
    order = np.random.default_rng(0).permutation(B * H * N)
    return q, k, v, jnp.asarray(order.reshape(B, H, N), jnp.int32)


def plain(q, k, v, lengths, pages):
    """Outputs and log-sum-exps, row by row in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -1e30)
    for b, h in np.ndindex(*lengths.shape):
        n = int(lengths[b, h])
        if n:
            own_k, own_v = (x[np.asarray(pages)[b, h]].reshape(-1, K)[:n] for x in (k, v))
            scores = q[b, h] @ own_k.T / np.sqrt(K)
            lse[b, h] = np.log(np.exp(scores).sum(-1))
            out[b, h] = np.exp(scores - lse[b, h][:, None]) @ own_v
    return out, lse


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_ragged_rows(implementation, dtype, tolerance):
    q, k, v, pages = cache(dtype)
    got = attend(q, k, v, LENGTHS, pages, implementation=implementation)
    for have, want in zip(got, plain(q, k, v, LENGTHS, pages)):
        np.testing.assert_allclose(have, want, atol=tolerance, rtol=tolerance)
    assert not np.any(np.asarray(got[0])[np.asarray(LENGTHS) == 0])


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
def test_int8(implementation):
    q, k, v, pages = cache()
    scales = [jnp.abs(x).max(-1)[:, None] / 127 for x in (k, v)]
    small = [jnp.round(x / s.swapaxes(1, 2)).astype(jnp.int8) for x, s in zip((k, v), scales)]
    got, _ = cache_attention(
        q, *small, LENGTHS, pages, k_scale_p1c=scales[0], v_scale_p1c=scales[1], implementation=implementation
    )
    back = (x.astype(jnp.float32) * s.swapaxes(1, 2) for x, s in zip(small, scales))
    np.testing.assert_allclose(got, plain(q, *back, LENGTHS, pages)[0], atol=2e-5)


def test_one_list_of_pages():
    """Rows with as many pages as they need, in one list, as in a pool whose pages have owners."""
    q, k, v, pages = cache()
    needed = -(-LENGTHS // C)
    flat = np.concatenate([np.asarray(pages)[b, h, : int(needed[b, h])] for b, h in np.ndindex(B, H)])
    first = (jnp.cumsum(needed.reshape(-1)) - needed.reshape(-1)).reshape(B, H)
    for implementation in ("reference", "interpret"):
        got = attend(q, k, v, LENGTHS, jnp.asarray(flat, jnp.int32), first, implementation=implementation)
        np.testing.assert_allclose(got[0], plain(q, k, v, LENGTHS, pages)[0], atol=2e-6)


def merge(one, other):
    """Attention to the entries of two caches, from what was returned for each of them."""
    lse = jnp.logaddexp(one[1], other[1])
    share = (jnp.exp(x[1] - jnp.maximum(lse, 2 * ref.NEGATIVE))[..., None] for x in (one, other))
    return sum(x[0] * w for x, w in zip((one, other), share)), lse


def test_contiguous_caches_and_parts_merge():
    q, k, v, _ = cache()
    whole_k, whole_v = (x.reshape(B, H, N * C, K) for x in (k, v))
    (k_pages, table), (v_pages, _) = in_pages(whole_k, C), in_pages(whole_v, C)
    full = jnp.full((B, H), N * C, jnp.int32)
    one = attend(q, k_pages, v_pages, full, table, implementation="interpret")
    parts = [
        attend(q, k_pages, v_pages, full * 0 + n, table[:, :, part], implementation="interpret")
        for n, part in ((2 * C, slice(0, 2)), (3 * C, slice(2, 5)), (0, slice(0, 1)))
    ]
    for have, want in zip(merge(merge(parts[0], parts[1]), parts[2]), one):
        np.testing.assert_allclose(have, want, atol=2e-6)
    nothing = merge(parts[2], parts[2])
    assert not np.any(nothing[0]) and np.all(np.isfinite(nothing[0]))
    with pytest.raises(ValueError, match="do not divide the capacity 160"):
        in_pages(whole_k, 48)


def test_steps_name_live_pages_only():
    lengths = LENGTHS.reshape(-1)
    first = jnp.arange(B * H, dtype=jnp.int32) * N
    steps = kernel.steps_of(lengths, jnp.arange(B * H * N, dtype=jnp.int32), first, C, 2)
    read = []
    for s in range(int(steps.count)):
        live = -(-min(int(steps.left[s]), 2 * C) // C)
        read += [(int(steps.row[s]), int(steps.pages[steps.at[s] + i])) for i in range(live)]
    want = [(r, r * N + i) for r, n in enumerate(np.asarray(lengths)) for i in range(-(-int(n) // C))]
    assert read == want


def test_nothing_races(capfd):
    q, k, v, pages = cache()
    got = run(capfd, functools.partial(cache_attention, implementation="tpu"), q, k, v, LENGTHS, pages)
    for have, want in zip(got, plain(q, k, v, LENGTHS, pages)):
        np.testing.assert_allclose(have, want, atol=2e-6)


def test_bad_input():
    q, k, v, pages = cache()
    int8 = k.astype(jnp.int8)
    for match, args in {
        "q_bhgk: expected shape": (q[0], k, v, LENGTHS, pages),
        "v_pck: expected shape": (q, k, v[1:], LENGTHS, pages),
        "lengths_bh: expected integer": (q, k, v, LENGTHS.astype(jnp.float32), pages),
        "pages: expected shape": (q, k, v, LENGTHS, pages[0]),
        "k_scale_p1c: int8 pages need scales": (q, int8, int8, LENGTHS, pages),
        "expected the queries' float32 or int8": (q, k, v.astype(jnp.bfloat16), LENGTHS, pages),
    }.items():
        with pytest.raises(ValueError, match=match):
            cache_attention(*args)
    with pytest.raises(ValueError, match="implementation: expected one of"):
        cache_attention(q, k, v, LENGTHS, pages, implementation="cuda")
    with pytest.raises(ValueError, match="a multiple of 8 float32 entries per page, got 4"):
        cache_attention(q, k[:, :4], v[:, :4], LENGTHS, pages, implementation="interpret")
