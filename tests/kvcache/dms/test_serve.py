"""The serving cache against the official implementation's numbers, and against the pass without a cache.

tests/golden/dms: two layers, window 8, from NVIDIA Model-Optimizer's experimental/dms (commit a2fbac7ba) on a CPU.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax.checkpoint import families
from atom_jax.checkpoint.safetensors_io import SafetensorsSource
from atom_jax.inference import decode
from atom_jax.inference.generate import generate
from atom_jax.kvcache.dms import DMS, pool
from atom_jax.kvcache.memory import Sizes
from atom_jax.models import transformer
from atom_jax.params import init, nbytes
from atom_jax.typing import LM, Batch

VARIANTS = ["borrowed_neuron", "separate_alpha", "separate_alpha_per_layer"]
WINDOW = 8


def tiny(**policy) -> transformer.TransformerConfig:
    """The fixtures' sizes."""
    return transformer.TransformerConfig(
        family="qwen3", vocab_size=96, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128,
        norm_eps=1e-6, tie_embeddings=False, memory=DMS(window=WINDOW, **{"page": 4, **policy}),
    )  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def official(request, golden):
    """(configuration, parameters, reference numbers) of one variant."""
    folder = golden / "dms" / request.param
    published = json.loads((folder / "config.json").read_text())
    form = "adapter" if published["dms_separate_alpha"] else "borrowed"
    cfg = tiny(form=form, per=published["dms_alpha_per"])
    return cfg, families.load(SafetensorsSource(folder), cfg), load_file(folder / "io.safetensors")


@functools.partial(jax.jit, static_argnames="cfg")
def whole(params, batch, *, cfg):
    """Logits and decisions of the pass without a cache."""
    x, _, aux = transformer.hidden(params, batch, cfg=cfg)
    return transformer.logits(params, x, cfg=cfg), aux


@functools.partial(jax.jit, static_argnames="cfg")
def extend(params, batch, cache, *, cfg):
    """Logits [b, t, v] and the cache after these tokens."""
    out, cache = transformer.apply(params, batch, cfg=cfg, cache=cache)
    return out.logits, cache


def batch_of(ids, start=0, lengths=None):
    """Right-padded rows whose tokens stand at start, start + 1, ..."""
    ids = jnp.asarray(ids, jnp.int32)
    b, t = ids.shape
    start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (b,))
    real = jnp.arange(t)[None] < jnp.full((b, 1), t) if lengths is None else jnp.arange(t)[None] < lengths[:, None]
    return Batch(ids, start[:, None] + jnp.arange(t)[None], real.astype(jnp.int32))


def read(params, ids, cache, *, cfg, lengths=None):
    """`extend` with room made before it and trimmed after it."""
    cache = transformer.grow(cache, ids.shape[1])
    out, cache = extend(params, batch_of(ids, cache.length, lengths), cache, cfg=cfg)
    return out, transformer.grow(cache)


def read_in(params, ids, size, *, cfg):
    """Logits of all tokens and the cache, reading `size` at a time."""
    cache, out = transformer.init_cache(cfg, len(ids), 1), []
    for at in range(0, ids.shape[1], size):
        one, cache = read(params, ids[:, at : at + size], cache, cfg=cfg)
        out.append(one)
    return jnp.concatenate(out, axis=1), cache


@pytest.mark.parametrize("size", [40, 5, 7, 16])
def test_official_prompt(official, size):
    cfg, params, io = official
    out, cache = read_in(params, io["input_ids"], size, cfg=cfg)
    np.testing.assert_allclose(out, io["prefill_logits"], atol=3e-4)
    name = "prefill_occupancy" if size == 40 else f"prefill_occupancy_chunk{size}"
    np.testing.assert_array_equal(cache.layers.pool.n, io[name])


def test_official_left_padding(official):
    cfg, params, io = official
    real = io["leftpad_attention_mask"].astype(np.int32)
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    batch = Batch(jnp.asarray(io["input_ids"], jnp.int32), jnp.asarray(positions), jnp.asarray(real))
    out, aux = whole(params, batch, cfg=cfg)
    np.testing.assert_allclose(out[real > 0], io["leftpad_logits"][real > 0], atol=3e-4)
    np.testing.assert_array_equal(aux["occupancy"], io["leftpad_occupancy"])


def test_official_decoding(official):
    cfg, params, io = official
    out, cache = read_in(params, io["input_ids"], 40, cfg=cfg)
    token, made, last = out[:, -1].argmax(-1), [], []
    for step in range(47):
        made.append(np.asarray(token))
        if bool(transformer.full(cache).any()):
            cache = transformer.grow(cache)
        out, cache = extend(params, batch_of(token[:, None], cache.length), cache, cfg=cfg)
        np.testing.assert_array_equal(cache.layers.pool.n, io["decode_occupancy"][step])
        token = out[:, 0].argmax(-1)
        last.append(out[:, 0])
    made.append(np.asarray(token))
    np.testing.assert_array_equal(np.stack(made, axis=1), io["greedy_ids"])
    np.testing.assert_allclose(jnp.stack(last, axis=1), io["full_sequence_logits"][:, 40:], atol=3e-4)
    keys = projected_keys(params, batch_of(io["full_sequence_ids"]), cfg)
    for layer in range(2):
        for row in range(4):
            held = np.sort(entries(cache, layer, row), axis=0)
            kept = io["retained_mask_after_last_step"][layer].reshape(4, -1)[row] > 0
            expected = np.sort(keys[layer].reshape(4, -1, 16)[row][kept], axis=0)
            np.testing.assert_allclose(held, expected, atol=1e-4)


def projected_keys(params, batch, cfg):
    """Keys [l, b, h, t, k] of the pass without a cache."""
    probe = lambda p, x, q, k, *rest: k  # noqa: E731
    return np.asarray(transformer.hidden(params, batch, cfg=cfg, probe=probe)[2]["probe"])


def entries(cache, layer, row):
    """Keys [n, k] in the pages of a row."""
    p = jax.tree.map(lambda x: np.asarray(x[layer]), cache.layers.pool)
    return np.concatenate([p.k[i][: p.filled[i]] for i in np.flatnonzero(p.owner == row)])


def test_official_whole_sequence(official):
    cfg, params, io = official
    out, _ = read_in(params, io["full_sequence_ids"], 87, cfg=cfg)
    np.testing.assert_allclose(out, io["full_sequence_logits"], atol=3e-4)
