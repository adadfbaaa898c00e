"""Training with learned units: on many devices, in parts, recomputed, in bfloat16, and in memory linear in length."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules.cosine import Cosine
from atom_jax.chunking.rules.predictor import Predictor
from atom_jax.models import hnet
from atom_jax.models.hnet import HNetConfig
from atom_jax.training import losses
from atom_jax.typing import Batch
from tests.models.tiny_units import MODELS, rows, stream, weights
from tests.training.tiny import batches, make, mesh, program, sizes

LENGTHS = np.ones(264, np.int32)


@functools.cache
def run(name: str, *settings: str, steps: int = 3):
    """Metrics of every step, and the last state, on the host; all steps are one program."""
    exp = make(*settings, model=MODELS[name])
    with jax.set_mesh(mesh(exp.mesh)):
        p, out = program(exp), []
        state = p.initial()
        for batch in batches(exp, steps):
            state, metrics = p.step(state, p.put(batch))
            out.append(jax.device_get(metrics))
        assert p.step._cache_size() == 1
        return out, jax.device_get(state)


@pytest.mark.parametrize("name", ["hnet", "magnet"])
def test_eight_devices_equal_one(name):
    one, _ = run(name)
    many, _ = run(name, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    for a, b in zip(one, many):
        assert a.keys() == b.keys() and a["bad"] == 0
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=2e-3 if key == "grad_norm" else 2e-4, err_msg=key)


def test_parts_of_a_batch_add_up():
    """Exactly where the rule has no loss of its own, which need not be linear in the rows."""
    (whole, *_), a = run("words", steps=1)
    (parts, *_), b = run("words", "optim.accumulate=4", steps=1)
    chex.assert_trees_all_close(whole, parts, rtol=1e-4)
    chex.assert_trees_all_close(a.opt, b.opt, rtol=1e-3, atol=1e-7)


def batch_of():
    batch = rows([[stream(24)], [stream(10, 5), stream(9, 20)]], 24)
    return batch.replace(targets=np.roll(batch.ids, -1, axis=1), loss_mask=batch.segments > 0)


@functools.cache
def gradient(cfg):
    """The loss of a model with `weights` of the plain configuration, and its gradients."""

    def loss(p):
        return losses.next_token(p, batch_of(), jax.random.key(0), cfg=cfg, lengths=LENGTHS).objective

    return jax.jit(jax.value_and_grad(loss))(plain(cfg))


def plain(cfg):
    return weights(dataclasses.replace(cfg, remat=False, dtype="float32"))


def test_recomputing_changes_nothing():
    cfg = MODELS["hnet-2"]
    chex.assert_trees_all_close(gradient(dataclasses.replace(cfg, remat=True)), gradient(cfg), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["hnet-2", "gumbel", "words", "megabyte"])
def test_bfloat16_stays_close(name):
    cfg = MODELS[name]
    half = dataclasses.replace(cfg, dtype="bfloat16")
    exact, (value, grads) = gradient(cfg)[0], gradient(half)
    chex.assert_tree_all_finite(grads)
    np.testing.assert_allclose(value, exact, rtol=0.05)
    read = jax.jit(lambda p, batch, cache: hnet.apply(p, batch, cfg=half, cache=cache))
    out, _ = read(weights(cfg), batch_of(), hnet.init_cache(half, 2, 32))
    assert out.logits.dtype == jnp.float32 and np.isfinite(out.logits).all()


def largest(cfg, b, t):
    """Elements of the largest array that the gradient of the loss computes for b rows of t bytes."""
    ids = jax.ShapeDtypeStruct((b, t), jnp.int32)
    batch = Batch(ids, ids, ids, ids, jax.ShapeDtypeStruct((b, t), bool))

    def loss(p, batch):
        return losses.next_token(p, batch, jax.random.key(0), cfg=cfg, lengths=LENGTHS).objective

    return max(sizes(jax.make_jaxpr(jax.grad(loss))(params.abstract(hnet.spec(cfg)), batch).jaxpr))


SIZES = {"vocab_size": 264, "d_model": (32, 64), "n_heads": (2, 2), "rotary_dim": (8, 16), "window": (127, -1)}
CHUNKING = {"capacity": 0.5}
LONG = {
    "hnet": HNetConfig(
        layout=("m2T2", "T2m2", "m2"), d_intermediate=(64, 64), **SIZES,
        chunking=(Chunking(rule=Cosine(), mix="ema", confidence=True, **CHUNKING),),
    ),
    "hnet, packed": HNetConfig(
        layout=("m1", "T2", "t1"), d_intermediate=(64, 64), remat=True, **SIZES,
        chunking=(Chunking(rule=Cosine(), mix="ema", confidence=True, pack=True, **CHUNKING),),
    ),
    "dynamic pooling": HNetConfig(
        layout=("x1", "x2", "x1"), d_intermediate=(64, 64), **SIZES | {"d_model": (32, 32)},
        chunking=(Chunking(rule=Predictor(), pool="mean", residual="identity", norm=True, **CHUNKING),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_no_array_grows_faster_than_the_text(name):
    b, t = 2, 4096
    most = largest(LONG[name], b, t)
    # A [b, t, m] array would have 2,048 entries per position, a [b, t, t] one twice as many.
    assert most < 1024 * b * t
    assert most <= 2.1 * largest(LONG[name], b, t // 2)
