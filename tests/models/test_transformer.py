"""The four families against the official implementations' numbers, and what must hold for any of them."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import atom_jax
from atom_jax import params
from atom_jax.models import transformer
from atom_jax.models.transformer import FAMILIES, TransformerConfig
from atom_jax.typing import AtomError, Batch


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request, golden):
    directory = golden / "hf_tiny" / request.param
    return atom_jax.load(str(directory)), load_file(directory / "io.safetensors")


def batch(ids, positions=None, segments=None):
    ids = jnp.asarray(ids, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    segments = jnp.ones_like(ids) if segments is None else segments
    return Batch(ids, jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32))


@functools.partial(jax.jit, static_argnames="cfg")
def run(p, b, cache=None, *, cfg):
    out, cache = transformer.apply(p, b, cfg=cfg, cache=cache)
    return out.logits, cache


def logits(lm, b, **changes):
    return run(lm.params, b, cfg=dataclasses.replace(lm.config, **changes))[0]


def test_logits_equal_the_official_ones(case):
    lm, io = case
    np.testing.assert_allclose(logits(lm, batch(io["input_ids"])), io["logits"], atol=2e-4)


def test_left_padded_logits_equal_the_official_ones(case):
    lm, io = case
    real = io["leftpad_attention_mask"] == 1
    out = logits(lm, batch(io["input_ids"], io["leftpad_position_ids"], real))
    np.testing.assert_allclose(np.asarray(out)[real], io["leftpad_logits"][real], atol=2e-4)


def test_packed_documents_do_not_see_each_other(case):
    lm, io = case
    ids = io["input_ids"]
    row = np.concatenate([ids[0, :25], ids[1, :15]])[None]
    positions = np.concatenate([np.arange(25), np.arange(15)])[None]
    segments = np.repeat([1, 2], [25, 15])[None]
    # What comes later changes nothing either.
    out, apart = logits(lm, batch(row, positions, segments))[0], logits(lm, batch(ids))
    np.testing.assert_allclose(out[:25], apart[0, :25], atol=1e-4)
    np.testing.assert_allclose(out[25:], apart[1, :15], atol=1e-4)


def test_prefill_and_steps_equal_the_whole(case):
    lm, io = case
    cfg, ids = lm.config, io["input_ids"]
    whole = logits(lm, batch(ids))
    cache = transformer.init_cache(cfg, 2, 48)
    for start, stop in [(0, 13), (13, 26), (26, 27), (27, 40)]:
        positions = np.broadcast_to(np.arange(start, stop)[None], (2, stop - start))
        out, cache = run(lm.params, batch(ids[:, start:stop], positions), cache, cfg=cfg)
        np.testing.assert_allclose(out, whole[:, start:stop], atol=1e-4)
    np.testing.assert_array_equal(cache.length, [40, 40])


def test_unrolled_layers_and_remat_change_nothing(case):
    lm, io = case
    b = batch(io["input_ids"])
    unrolled = transformer.decode_params(lm.params, lm.config, unroll=True)
    np.testing.assert_allclose(run(unrolled, b, cfg=lm.config)[0], logits(lm, b), atol=1e-4)

    def grads(remat):
        return jax.jit(jax.grad(lambda p: logits(dataclasses.replace(lm, params=p), b, remat=remat).std()))(lm.params)

    chex.assert_trees_all_close(grads(True), grads(False), atol=1e-5)


def test_bfloat16_compute_stays_close(case):
    lm, io = case
    out = logits(lm, batch(io["input_ids"]), dtype="bfloat16")
    assert out.dtype == jnp.float32
    assert np.abs(np.asarray(out) - io["logits"]).mean() < 0.05 * io["logits"].std()


def test_real_configurations_have_the_published_sizes():
    smollm2 = TransformerConfig(
        vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536, tie_embeddings=True
    )
    assert params.count(transformer.spec(smollm2)) == 134_515_008


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"family": "gpt"}, "llama, qwen3"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"layer_types": ("full",)}, "layer_types"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_impossible_configurations_are_refused(change, words):
    with pytest.raises(AtomError, match=words):
        TransformerConfig(**change)
