"""Slots of merged positions against the rule of the paper, written out position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.nn import slots
from atom_jax.nn.attention import Tokens
from atom_jax.nn.slots import SlotState

H, K, D, NEAR, SLOTS, ROTARY, ALIKE = 2, 6, 8, 4, 3, 4, 0.6
RNG = np.random.default_rng(0)
P = {
    "qkv": 0.7 * RNG.normal(size=(D, 3, H, K)).astype(np.float32),
    "o": RNG.normal(size=(H, K, D)).astype(np.float32),
}


def turned(x, place):
    freq = 10000.0 ** (-np.arange(0, ROTARY, 2) / ROTARY)
    c, s, r = np.cos(place * freq), np.sin(place * freq), ROTARY // 2
    a, b = x[:r], x[r:ROTARY]
    return np.concatenate([a * c - b * s, b * c + a * s, x[ROTARY:]])


def reference(x):
    """[t, d] of one document."""
    q, k, v = np.einsum("td,dchk->cthk", x.astype(np.float64), P["qkv"])
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    out, merged = np.zeros((len(x), H, K)), 0
    for h in range(H):
        held = []
        for t in range(len(x)):
            if t >= NEAR:
                new_k, new_v = k[t - NEAR, h], v[t - NEAR, h]
                best = max(held, key=lambda s: cos(s["k"], new_k), default=None)
                if best is not None and cos(best["k"], new_k) > ALIKE:
                    c, merged = best["c"], merged + 1
                    best |= {"k": (c * best["k"] + new_k) / (c + 1), "v": (c * best["v"] + new_v) / (c + 1)}
                    best |= {"c": c + 1, "age": 0}
                else:
                    if len(held) == SLOTS:
                        oldest = max(held, key=lambda s: s["age"])
                        held = [s for s in held if s is not oldest]
                    held.append({"k": new_k, "v": new_v, "c": 1, "age": 0})
                for s in held:
                    s["age"] += 1
            newest = range(max(t - NEAR + 1, 0), t + 1)
            chosen = {max(range(len(held)), key=lambda j, i=i: cos(held[j]["k"], k[i, h])) for i in newest if held}
            keys = [held[j]["k"] for j in chosen] + [turned(k[i, h], NEAR - t + i) for i in newest]
            values = [held[j]["v"] for j in chosen] + [v[i, h] for i in newest]
            w = np.exp(np.array(keys) @ turned(q[t, h], NEAR) * K**-0.5)
            out[t, h] = w @ np.array(values) / w.sum()
    return np.einsum("thk,hkd->td", out, P["o"]), merged


def given(lengths, t):
    n = sum(lengths)
    x = RNG.normal(size=(n, D)).astype(np.float32)
    pad = lambda a: jnp.asarray(np.pad(a, [(0, t - n)] + [(0, 0)] * (a.ndim - 1)))[None]  # noqa: E731
    positions = np.concatenate([np.arange(m) for m in lengths])
    return x, pad(x), Tokens(pad(positions), pad(np.repeat(np.arange(len(lengths)) + 1, lengths)))


def run(x, tokens, state):
    return slots.layer(P, x, tokens, state, rotary=ROTARY, eps=1e-5, near=NEAR, slots=SLOTS, alike=ALIKE)


def test_a_row_of_documents_is_what_the_rule_says(monkeypatch):
    monkeypatch.setattr(slots, "CHUNK", 7)
    x, row, tokens = given((19, 3, 10), 36)
    wanted, merged = zip(*map(reference, np.split(x, (19, 22))))
    assert 0 < sum(merged) < 2 * (15 + 6)
    found, state = jax.jit(run)(row, tokens, None)
    np.testing.assert_allclose(found[0, :32], np.concatenate(wanted), atol=1e-4, rtol=1e-4)
    assert state is None
    grad = jax.jit(jax.grad(lambda x: jnp.sin(run(x, tokens, None)[0][0, 18]).sum()))(row)[0]
    assert np.isfinite(grad).all() and np.abs(grad[:15]).max() > 0 and not np.abs(grad[19:]).any()


@pytest.mark.parametrize("cuts", [(1,) * 20, (5, 15), (2, 11, 1, 6)])
def test_parts_and_single_tokens_are_what_all_at_once_is(cuts):
    _, x, tokens = given((20,), 20)
    whole, _ = jax.jit(run)(x, tokens, None)
    state, found, one = SlotState.empty(1, H, K, NEAR, SLOTS, jnp.float32), [], jax.jit(run)
    for n, end in zip(cuts, np.cumsum(cuts)):
        part = lambda a, n=n, end=end: jnp.pad(a[:, end - n : end], [(0, 0), (0, 16 - n)] + [(0, 0)] * (a.ndim - 2))  # noqa: E731
        y, state = one(part(x), Tokens(part(tokens.positions), part(tokens.segments)), state)
        found.append(y[0, :n])
    np.testing.assert_allclose(np.concatenate(found), whole[0], atol=1e-5)
    assert (state.count > 0).all() and state.count.sum() > H * SLOTS
