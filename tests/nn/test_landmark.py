"""Landmark attention against numbers of the official code (tests/golden/lasting) and plain sums, and in pieces."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.kvcache.landmark import LandmarkLayer
from atom_jax.nn import landmark
from atom_jax.nn.attention import Tokens
from atom_jax.nn.landmark import Blocks, Places

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lasting" / "landmark.npz"
D, H, K, EVERY = 6, 2, 4, 3


@pytest.mark.parametrize("rows", [64, 4])
def test_official_numbers(rows, monkeypatch):
    monkeypatch.setattr(landmark, "ROWS", rows)
    z = dict(np.load(GOLDEN))
    assert z["is_landmark"].nonzero()[0].tolist() == [3, 7, 11]
    # Keys that are unit vectors: queries are the scores, and outputs the weights.
    one, block = np.eye(14, dtype=np.float32), np.arange(14)[None] // 4
    keys = np.broadcast_to(one, (1, 2, 14, 14))
    inside = keys[:, :, :12].reshape(1, 2, 3, 4, 14)
    blocks = Blocks(inside[:, :, :, :3], inside[:, :, :, :3], inside[:, :, :, 3])
    # A landmark sees its block, and not itself.
    places = Places(
        block * 4, np.minimum(np.arange(14)[None] % 4 + 1, 3), np.arange(3)[None, None] < block[..., None]
    )

    @jax.jit
    def probs(scores):
        return landmark.attend(scores * 14**0.5, keys, keys, blocks, places)

    found, back = jax.vjp(probs, z["scores"])
    np.testing.assert_allclose(found, z["probs"], atol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(back(z["upstream"])[0], z["grad_scores"], atol=1e-4)


@pytest.fixture(scope="module")
def p():
    rng = np.random.default_rng(0)
    shapes = {"qkv": (D, 3, H, K), "mark": (D, H, K), "o": (H, K, D), "q_norm": (K,), "k_norm": (K,)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnames=("nearest", "rotary"))
def layer(p, x, tokens, cache=None, length=None, nearest=0, rotary=0):
    return landmark.layer(p, x, tokens, cache, length, rotary=rotary, eps=1e-5, every=EVERY, nearest=nearest)


def naive(p, x_td, nearest):
    """The layer's outputs for one document, without RoPE, position by position."""
    norm = lambda x, w: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w  # noqa: E731
    soft = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()  # noqa: E731
    q, k, v = np.einsum("td,dihk->ithk", x_td, p["qkv"])
    mark = norm(np.einsum("td,dhk->thk", x_td, p["mark"]), p["k_norm"])
    q, k, out = norm(q, p["q_norm"]), norm(k, p["k_norm"]), []
    for t in range(len(x_td)):
        first, both = t // EVERY * EVERY, []
        for h in range(H):
            score = lambda keys, t=t, h=h: keys[:, h] @ q[t, h] * K**-0.5  # noqa: E731
            gate = score(mark[EVERY - 1 : first : EVERY])
            if 0 < nearest < len(gate):
                gate[np.argsort(gate)[:-nearest]] = -np.inf
            w = soft(np.concatenate([score(k[first : t + 1]), gate]))
            n = t + 1 - first
            sums = w[:n] @ v[first : t + 1, h]
            for b in range(len(gate)):
                part = slice(b * EVERY, (b + 1) * EVERY)
                sums = sums + w[n + b] * soft(score(k[part])) @ v[part, h]
            both.append(sums)
        out.append(np.einsum("hk,hkd->d", both, p["o"]))
    return np.array(out)


@pytest.mark.parametrize("nearest", [0, 1])
def test_documents_are_read_by_themselves(p, nearest, monkeypatch):
    monkeypatch.setattr(landmark, "ROWS", 8)
    lengths, t = (11, 1, 7), 24
    positions, segments = np.zeros((2, 1, t), np.int32)
    x, at, wanted = np.random.default_rng(1).normal(size=(1, t, D)).astype(np.float32), 2, []
    for i, n in enumerate(lengths):
        here = slice(at, at + n)
        positions[0, here], segments[0, here] = np.arange(n), i + 1
        wanted.append(naive(jax.tree.map(np.asarray, p), x[0, here], nearest))
        at += n
    found = layer(p, x, Tokens(positions, segments), nearest=nearest)[0]
    np.testing.assert_allclose(found[0, 2:at], np.concatenate(wanted), atol=1e-5)


@pytest.mark.parametrize("nearest", [0, 1])
def test_pieces_and_single_positions_give_the_whole(p, nearest):
    b, t = 2, 14
    x = np.random.default_rng(2).normal(size=(b, t, D)).astype(np.float32)
    at = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t))
    whole = layer(p, x, Tokens(at, np.ones_like(at)), nearest=nearest, rotary=2)[0]
    cache, length, out = LandmarkLayer.empty(b, H, 7, K, EVERY, nearest, jnp.float32), np.zeros(b, np.int32), {}
    assert cache.k.shape[2] == 9 and cache.mark.shape[2] == 3
    # Rows of different lengths: what is padding in one is written by nobody.
    for counts in ((5, 3), *[(1, 1)] * 9, (0, 1), (0, 1)):
        n, counts = max(counts), np.array(counts)
        if bool(cache.full(length, n).any()):
            cache = cache.grow(length, n)
        part = np.minimum(length[:, None] + np.arange(n)[None], t - 1)
        real = (np.arange(n)[None] < counts[:, None]).astype(np.int32)
        new, cache = layer(
            p, np.take_along_axis(x, part[..., None], 1), Tokens(part, real), cache, length, nearest, 2
        )  # fmt: skip
        out |= {(r, part[r, i]): new[r, i] for r in range(b) for i in range(counts[r])}
        length = length + counts.astype(np.int32)
    assert cache.k.shape[2] == 18 and length.tolist() == [14, 14] == cache.held(length)[:, 0].tolist()
    # Four landmarks are half an entry each, and two positions are of the own block.
    assert cache.read(length)[0, 0] == 2 + 2 + (3 if nearest else 12)
    for (r, i), y in out.items():
        np.testing.assert_allclose(y, whole[r, i], atol=1e-5)


def test_weights_of_all_positions_never_exist_together(p, monkeypatch):
    monkeypatch.setattr(landmark, "ROWS", 16)
    t = 256
    at = jnp.arange(t, dtype=jnp.int32)[None]
    tokens = Tokens(at, jnp.ones_like(at))

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (x.aval.size for x in eqn.outvars)
            for inner in jax.core.jaxprs_in_params(eqn.params):
                yield from sizes(inner)

    loss = lambda x: landmark.layer(p, x, tokens, None, None, rotary=2, eps=1e-5, every=16)[0].sum()  # noqa: E731
    made = jax.make_jaxpr(jax.grad(loss))(jnp.zeros((1, t, D)))
    assert max(sizes(made.jaxpr)) <= 16 * t * H * K < t * t
