"""Attention to nearest neighbours against its formulas, written out position by position, and in pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params
from atom_jax.kvcache.knn import KnnLayer
from atom_jax.nn import knn_attention
from atom_jax.nn.attention import Tokens
from atom_jax.nn.knn_attention import Keys

H, K, D, NEAR, SIZE, NEAREST, ROTARY = 2, 6, 8, 3, 7, 4, 4
RNG = np.random.default_rng(0)
P = {
    "qkv": 0.7 * RNG.normal(size=(D, 3, H, K)).astype(np.float32),
    "o": RNG.normal(size=(H, K, D)).astype(np.float32),
    "gate": np.array([0.4, -0.7], np.float32),
    "logit_scale": np.array([0.3, 1.1], np.float32),
    "q_norm": RNG.uniform(0.5, 2, K).astype(np.float32),
    "k_norm": RNG.uniform(0.5, 2, K).astype(np.float32),
}
MATRICES = {name: x for name, x in P.items() if not name.endswith("norm")}


def turned(x, place):
    freq = 10000.0 ** (-np.arange(0, ROTARY, 2) / ROTARY)
    c, s, r = np.cos(place * freq), np.sin(place * freq), ROTARY // 2
    a, b = x[:r], x[r:ROTARY]
    return np.concatenate([a * c - b * s, b * c + a * s, x[ROTARY:]])


def soft(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def reference(p, x, nearest=NEAREST):
    """[t, d] of one document: a list of what left the newest positions, of which the oldest is dropped."""
    q, k, v = np.einsum("td,dchk->cthk", x.astype(np.float64), p["qkv"])
    if "q_norm" in p:
        norm = lambda x, w: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w  # noqa: E731
        q, k = norm(q, p["q_norm"]), norm(k, p["k_norm"])
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    out = np.zeros((len(x), H, K))
    for h in range(H):
        memory = []
        for t in range(len(x)):
            if t >= NEAR:
                memory = [*memory, (unit(k[t - NEAR, h]), v[t - NEAR, h])][-SIZE:]
            newest = range(max(t - NEAR + 1, 0), t + 1)
            scores = [turned(k[i, h], i) @ turned(q[t, h], t) * K**-0.5 for i in newest]
            out[t, h] = soft(np.array(scores)) @ v[newest.start : t + 1, h]
            if memory:
                best = sorted(memory, key=lambda one: -(one[0] @ unit(q[t, h])))[:nearest]
                cosines = np.array([key @ unit(q[t, h]) for key, _ in best])
                found = soft(cosines * np.exp(p["logit_scale"][h]) * K**0.5) @ np.array([value for _, value in best])
                g = 1 / (1 + np.exp(-p["gate"][h]))
                out[t, h] = (1 - g) * out[t, h] + g * found
    return np.einsum("thk,hkd->td", out, p["o"])


def given(lengths, t, left=0):
    n = sum(lengths)
    x = RNG.normal(size=(n, D)).astype(np.float32)
    pad = lambda a: jnp.asarray(np.pad(a, [(left, t - n - left)] + [(0, 0)] * (a.ndim - 1)))[None]  # noqa: E731
    positions = np.concatenate([np.arange(m) for m in lengths])
    return x, pad(x), Tokens(pad(positions), pad(np.repeat(np.arange(len(lengths)) + 1, lengths)))


@functools.partial(jax.jit, static_argnames=("nearest", "fresh"))
def run(p, x, tokens, cache=None, length=None, nearest=NEAREST, fresh=False):
    options = {"near": NEAR, "size": SIZE, "nearest": nearest, "fresh": fresh}
    return knn_attention.layer(p, x, tokens, cache, length, rotary=ROTARY, eps=1e-5, **options)


def ring(b, capacity=NEAR + SIZE, dtype=jnp.float32):
    return KnnLayer.empty(b, H, capacity, K, dtype, NEAR + SIZE, NEAR, NEAREST)


def padded(x, n, end):
    room = 1 if n == 1 else 16
    return jnp.pad(x[:, end - n : end], [(0, 0), (0, room - n)] + [(0, 0)] * (x.ndim - 2))


def in_parts(p, x, tokens, cache, cuts):
    """Outputs of one call per part, each padded, and the memory at the end."""
    found, length = [], np.zeros(x.shape[0], np.int32)
    for n, end in zip(cuts, np.cumsum(cuts)):
        x_part, *places = (padded(a, n, end) for a in (x, tokens.positions, tokens.segments))
        if bool(cache.full(length, n).any()):
            cache = cache.grow(length, n)
        y, cache = run(p, x_part, Tokens(*places), cache, length)
        found.append(y[:, :n])
        length = length + n
    return jnp.concatenate(found, axis=1), cache


@pytest.mark.parametrize(("p", "rows"), [(P, 64), (MATRICES, 4)], ids=["norms", "plain"])
def test_a_row_of_documents_is_what_the_formulas_say(p, rows, monkeypatch):
    monkeypatch.setattr(knn_attention, "ROWS", rows)
    run.clear_cache()
    x, row, tokens = given((23, 2, 9, 14), 52, left=2)
    wanted = np.concatenate([reference(p, part) for part in np.split(x, (23, 25, 34))])
    found, state = run(p, row, tokens)
    assert state is None
    np.testing.assert_allclose(found[0, 2:50], wanted, atol=1e-4, rtol=1e-4)
    few = np.concatenate([reference(p, part, 1) for part in np.split(x, (23, 25, 34))])
    np.testing.assert_allclose(run(p, row, tokens, nearest=1)[0][0, 2:50], few, atol=1e-4, rtol=1e-4)
    assert np.abs(few - wanted).max() > 0.1
    run.clear_cache()


@pytest.mark.parametrize("cuts", [(1,) * 24, (5, 15, 4), (2, 11, 1, 1, 9), (12, 12), (3, 1, 16, 4)])
@pytest.mark.parametrize("capacity", [2, NEAR + SIZE])
def test_any_cut_gives_the_numbers_of_the_whole(cuts, capacity):
    x, row, tokens = given((24,), 24)
    found, cache = in_parts(P, row, tokens, ring(1, capacity), cuts)
    np.testing.assert_allclose(found[0], reference(P, x), atol=1e-4, rtol=1e-4)
    assert cache.k.shape[2] == NEAR + SIZE
    length = jnp.array([24])
    assert cache.held(length).tolist() == [[NEAR + SIZE] * H]
    assert cache.read(length).tolist() == [[NEAR + SIZE / 2 + NEAREST] * H]
    assert cache.read(jnp.array([5])).tolist() == [[3 + 2 / 2 + 2] * H]


def test_a_first_call_reads_no_empty_places():
    x, row, tokens = given((19,), 24)
    length = jnp.zeros(1, jnp.int32)
    one, other = (run(P, row, tokens, ring(1), length, fresh=fresh) for fresh in (True, False))
    np.testing.assert_allclose(one[0][0, :19], reference(P, x), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(other[0][0, :19], one[0][0, :19], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


def test_rows_of_different_lengths_know_nothing_of_each_other():
    b, t = 2, 20
    x = RNG.normal(size=(b, t, D)).astype(np.float32)
    cache, length, out = ring(b), np.zeros(b, np.int32), {}
    for counts in ((9, 2), (1, 1), (0, 1), (4, 12), (1, 0), (5, 4)):
        n, counts = max(counts), np.array(counts)
        part = np.minimum(length[:, None] + np.arange(n)[None], t - 1)
        real = (np.arange(n)[None] < counts[:, None]).astype(np.int32)
        new, cache = run(P, np.take_along_axis(x, part[..., None], 1), Tokens(part, real), cache, length)
        out |= {(r, part[r, i]): new[r, i] for r in range(b) for i in range(counts[r])}
        length = length + counts.astype(np.int32)
    assert length.tolist() == [20, 20]
    for r in range(b):
        alone = reference(P, x[r])
        np.testing.assert_allclose(np.stack([out[r, i] for i in range(t)]), alone, atol=1e-4, rtol=1e-4)


def marked(t):
    """Keys and queries that are all alike, and values that say which position they are of, in base 2."""
    one = jnp.ones((1, 1, t, K))
    bits = (np.arange(t)[:, None] >> np.arange(K)[None]) & 1
    at = jnp.arange(t)[None]
    return Keys(one, jnp.asarray(bits, jnp.float32)[None, None], jnp.full((1, 1, t), K**-0.5)), Tokens(at, at * 0 + 1)


@pytest.mark.parametrize("rows", [64, 8])
def test_a_part_never_finds_itself_nor_what_is_near(rows, monkeypatch):
    monkeypatch.setattr(knn_attention, "ROWS", rows)
    held, tokens = marked(40)
    back = lambda near, size: knn_attention.recall(  # noqa: E731
        held.k, held.inverse, held, tokens, tokens, near=near, size=size, nearest=1, aligned=True
    )
    for near, size in ((1, 1), (5, 1), (12, 1)):
        found, some = back(near, size)
        np.testing.assert_array_equal(some[0], np.arange(40) >= near)
        np.testing.assert_array_equal((found[0, 0] @ 2 ** np.arange(K))[near:], np.arange(40 - near))
    places = np.asarray(back(5, 40)[0][0, 0] @ 2 ** np.arange(K))[5:]
    assert (places <= np.arange(40 - 5)).all()


def test_the_gate_does_not_count_where_the_memory_is_empty():
    _, row, tokens = given((NEAR + 2, 2), 12)
    changed = lambda name: np.abs(run(P | {name: P[name] + 1}, row, tokens)[0] - run(P, row, tokens)[0]).max(-1)[0]  # noqa: E731
    assert (changed("gate") > 0).tolist() == [False] * NEAR + [True] * 2 + [False] * 7
    # A softmax of one key is what it is.
    assert (changed("logit_scale") > 1e-6).tolist() == [False] * (NEAR + 1) + [True] + [False] * 7
    own = {"gate": jnp.full(H, 30.0)}
    np.testing.assert_allclose(
        run(P | own, row, tokens)[0][0, :NEAR], run(P, row, tokens)[0][0, :NEAR], atol=0, rtol=0
    )


@pytest.mark.parametrize("rows", [64, 4])
def test_gradients_go_to_queries_gates_and_factors_and_to_nothing_stored(rows, monkeypatch):
    monkeypatch.setattr(knn_attention, "ROWS", rows)
    x, row, tokens = given((16,), 16)
    last = lambda p, x: knn_attention.layer(  # noqa: E731
        p, x, tokens, None, None, rotary=ROTARY, eps=1e-5, near=NEAR, size=SIZE, nearest=NEAREST
    )[0][0, 15]
    weights = RNG.normal(size=D)
    grads, by_x = jax.jit(jax.grad(lambda p, x: last(p, x) @ weights, argnums=(0, 1)))(P, row)
    assert not np.abs(by_x[0, : 16 - NEAR]).any() and np.abs(by_x[0, 16 - NEAR :]).max(-1).all()
    # What is stored stays as it is, where parameters change.
    q, k, v = (np.einsum("td,dhk->htk", x, P["qkv"][:, i])[None] for i in range(3))
    inverse = 1 / np.linalg.norm(k, axis=-1)
    args = (tokens, tokens)
    options = {"near": NEAR, "size": SIZE, "nearest": NEAREST, "aligned": True}
    found = lambda q, sharp, *held: knn_attention.recall(q, sharp, Keys(*held), *args, **options)[0][..., 15, :].sum()  # noqa: E731
    by = jax.grad(found, argnums=(0, 1, 2, 3, 4))(*map(jnp.asarray, (q, inverse, k, v, inverse)))
    assert np.abs(by[0][..., 15, :]).max() > 0 and np.abs(by[1][..., 15]).min() > 0
    assert not any(np.abs(one).any() for one in by[2:])
    for name in ("gate", "logit_scale"):
        for h in range(H):
            step = np.eye(H)[h] * 1e-4
            both = [reference(P | {name: P[name] + sign * step}, x)[15] @ weights for sign in (1, -1)]
            np.testing.assert_allclose(grads[name][h], (both[0] - both[1]) / 2e-4, atol=1e-3, rtol=1e-3)
    assert all(np.isfinite(one).all() for one in jax.tree.leaves(grads))


def test_gates_begin_in_the_middle():
    p = params.init(jax.random.key(0), knn_attention.layer_spec(H))
    assert not np.concatenate([p["gate"], p["logit_scale"]]).any()


def test_bfloat16_in_parts():
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), P)
    _, row, tokens = given((24,), 24)
    whole = run(p, row.astype(jnp.bfloat16), tokens)[0]
    assert whole.dtype == jnp.bfloat16
    found, cache = in_parts(p, row.astype(jnp.bfloat16), tokens, ring(1, dtype=jnp.bfloat16), (7, 1, 1, 15))
    assert found.dtype == cache.k.dtype == jnp.bfloat16 and cache.inverse.dtype == jnp.float32
    scale = np.abs(np.asarray(whole, np.float32)).max()
    np.testing.assert_allclose(found.astype(np.float32), whole.astype(np.float32), atol=0.02 * scale)


def test_scores_of_all_positions_never_exist_together(monkeypatch):
    monkeypatch.setattr(knn_attention, "ROWS", 16)
    t, size = 512, 64
    at = jnp.arange(t, dtype=jnp.int32)[None]
    tokens = Tokens(at, jnp.ones_like(at))

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (x.aval.size for x in eqn.outvars)
            for inner in jax.core.jaxprs_in_params(eqn.params):
                yield from sizes(inner)

    def most(size):
        held = Keys(jnp.zeros((1, H, t, K)), jnp.zeros((1, H, t, K)), jnp.zeros((1, H, t)))
        options = {"near": 8, "size": size, "nearest": 4, "aligned": True}
        loss = lambda q: knn_attention.recall(q, q[..., 0], held, tokens, tokens, **options)[0].sum()  # noqa: E731
        return max(sizes(jax.make_jaxpr(jax.grad(loss))(held.k).jaxpr))

    assert most(t) <= 16 * t * H < t * t / 4
    assert most(size) <= max(16 * (size + 15) * H, t * H * K) < 16 * t * H
