"""Means, penalties and the sequential cache next to the numbers of NVIDIA's code.

tests/golden/dmc: Megatron-LM's branch dmc (commit d36bf8d533) on a CPU, before RoPE: [t, b, heads, k], the last
channel of pooled keys being the penalty of training.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax.kvcache.dmc import DMC, decide, serve
from atom_jax.kvcache.dmc.pooling import Element, pooled
from atom_jax.kvcache.layer import Call, Sizes
from atom_jax.kvcache.policy import Heads, Mode
from atom_jax.nn.attention import Tokens

T, B, H, SIZE = 40, 2, 2, 16
PUBLISHED = DMC("borrowed", span=12)


@pytest.fixture(scope="module")
def io(golden):
    return load_file(golden / "dmc" / "dmc.safetensors")


def heads(io):
    q, k, v = (jnp.asarray(io[name]).transpose(1, 0, 2, 3) for name in "qkv")
    place = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    return Heads(None, q, k, v, Tokens(place, jnp.ones_like(place)))


def ours(io, cfg, mode):
    """Decisions, and pooled keys and values [b, h, t, k], before RoPE."""
    here = heads(io)
    said = decide.say({}, here, cfg)
    chosen = decide.decide(said, here.tokens, cfg, mode)
    k, v = (x.transpose(0, 2, 1, 3) for x in (decide.lend(here.k_bthk, cfg), here.v_bthk))
    return chosen, pooled(Element.tokens(chosen.p, said.w, k, v), cfg.span)


def theirs(x_tbnk):
    """[b, h, t, k] of what is repeated for the query heads of a group."""
    assert (x_tbnk[:, :, ::2] == x_tbnk[:, :, 1::2]).all()
    return x_tbnk[:, :, ::2].transpose(1, 2, 0, 3)


@pytest.mark.parametrize("span", [12, 40])
@pytest.mark.parametrize("tau", ["0.1", "2.0"])
def test_relaxed_means_penalties_and_shares(io, span, tau):
    cfg = DMC("borrowed", span=span, tau=float(tau))
    noise = jnp.asarray(io["noise"]).transpose(1, 2, 0)
    chosen, found = ours(io, cfg, Mode("relaxed", noise))
    k, v = (theirs(io[f"train_ws{span}_temp{tau}_{name}"]) for name in "kv")
    np.testing.assert_allclose(found.k[..., :-1], k[..., :-1], atol=1e-5)
    np.testing.assert_allclose(found.v, v, atol=1e-5)
    np.testing.assert_allclose(chosen.keep, k[..., -1], rtol=1e-5, atol=1e-5)
    # Theirs counts the first token's decision, too, which merges with nothing.
    first = (decide.say({}, heads(io), cfg).z[..., 0] + noise[..., 0] > 0).sum(1)
    np.testing.assert_allclose(
        (chosen.soft.sum((1, 2)) + first) / (H * T), io[f"train_ws{span}_temp{tau}_frac"], rtol=1e-5
    )
    if span == 40:
        # No text is longer.
        _, everything = ours(io, DMC("borrowed", tau=float(tau)), Mode("relaxed", noise))
        np.testing.assert_allclose(everything.k, found.k, atol=1e-5)


@pytest.mark.parametrize("span", [12, 40])
def test_hard_means(io, span):
    _, found = ours(io, DMC("borrowed", span=span), Mode())
    for name in "kv":
        expected = theirs(io[f"eval_ws{span}_{name}"])
        np.testing.assert_allclose(getattr(found, name), expected, atol=1e-5)


def test_the_cache_token_by_token(io):
    cfg = DMC("borrowed", page=4)
    here = heads(io)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (here.q_btnk, here.k_bthk, here.v_bthk))
    call = Call(
        q.reshape(B, H, -1, T, SIZE), k, v, here.tokens, jnp.zeros(B, jnp.int32), k_plain=k,
        said=decide.say({}, here, cfg), rotary=0,
    )  # fmt: skip
    layer = jax.tree.map(lambda x: x[0], serve.init(cfg, Sizes(1, B, H, 2, SIZE, jnp.float32), T, 1))

    def step(layer, i):
        layer = layer.extend(call.one(i))[1]
        return layer, (layer.pool.n, layer.tail.k[:, :, 0], layer.tail.v[:, :, 0])

    layer, (n, k, v) = jax.jit(lambda layer: jax.lax.scan(step, layer, jnp.arange(T)))(layer)
    np.testing.assert_array_equal(n, io["sequential_occupancy"])
    np.testing.assert_allclose(k, io["sequential_k"], atol=1e-5)
    np.testing.assert_allclose(v, io["sequential_v"], atol=1e-5)
    merges = decide.merges(call.said.z, here.tokens, cfg)
    np.testing.assert_array_equal(n[-1], 1 + (~merges[..., 1:]).sum(2))
    # What the pool holds of a head are the means at the ends of its entries.
    pool, ends = layer.pool, np.flatnonzero(~np.append(np.asarray(merges)[1, 0, 1:], False))
    mine = np.concatenate([pool.k[i][: pool.filled[i]] for i in np.flatnonzero(pool.owner == H)])
    np.testing.assert_allclose(mine, np.asarray(io["sequential_k"])[ends, 1, 0], atol=1e-5)
