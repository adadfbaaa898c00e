"""The losses of byteification against the official trainer's values and gradients."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax.checkpoint import families
from atom_jax.checkpoint.tensors import TensorInfo
from atom_jax.models.bolmo import BolmoConfig
from atom_jax.models.transformer import TransformerConfig
from atom_jax.transfer import byteify
from atom_jax.transfer.byteify import Lesson, Stage1, Weights
from atom_jax.typing import Batch, Suffix
from tests.models.tiny_bolmo import DIRECTORY

CFG = BolmoConfig(
    main=TransformerConfig(
        family="olmo2", d_model=64, n_layers=5, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=96, norm_eps=1e-6,
        rope_theta=500000.0,
    ),
    subwords=300, encoder_layers=1, decoder_layers=2, local_heads=4, local_d_ff=80, capacity=1.0, chunk=128,
)  # fmt: skip
RULES = (
    (r"^blocks\.", "model.layers."),
    (r"local_(encoder|decoder)\.blocks\.", r"model.local_\1.layers."),
    (r"^local_", "model.local_"),
    (r"attention\.w_(q|k|v)\b", r"self_attn.\1_proj"),
    (r"attention\.w_out", "self_attn.o_proj"),
    (r"attention\.(q|k)_norm", r"self_attn.\1_norm"),
    (r"\.attention_norm", ".post_attention_layernorm"),
    (r"(model\.layers\.\d+)\.feed_forward_norm", r"\1.post_feedforward_layernorm"),
    (r"\.feed_forward_norm", ".pre_feedforward_layernorm"),
    (r"\.xlstm_norm", ".pre_xlstm_layernorm"),
    (r"feed_forward\.w1", "mlp.gate_proj"),
    (r"feed_forward\.w2", "mlp.down_proj"),
    (r"feed_forward\.w3", "mlp.up_proj"),
    (r"expanded_embeddings", "subword_embedding"),
    (r"local_encoder\.embedding", "local_encoder.byte_embedding"),
    (r"lm_head\.norm", "model.norm"),
    (r"lm_head\.w_out", "lm_head"),
)


def published(name):
    """The name that a tensor of the trainer has in published checkpoints."""
    for pattern, new in RULES:
        name = re.sub(pattern, new, name)
    return name


@functools.cache
def numbers():
    return load_file(DIRECTORY / "loss.safetensors"), json.loads((DIRECTORY / "loss.json").read_text())["results"]


class Weighted:
    """The trainer's parameters, as `families.load` reads them."""

    def __init__(self):
        arrays = {k.removeprefix("param."): v for k, v in numbers()[0].items() if k.startswith("param.")}
        self.label = "golden trainer"
        self.arrays = {published(k): v for k, v in arrays.items() if not k.startswith("teacher.")}
        self.infos = {k: TensorInfo(v.shape, v.dtype) for k, v in self.arrays.items()}
        names = {"embed": "embeddings.weight", "norm": "lm_head.norm.weight", "unembed": "lm_head.w_out.weight"}
        self.source = {ours: jnp.asarray(arrays[f"teacher.{theirs}"]) for ours, theirs in names.items()}
        self.source["unembed"] = self.source["unembed"].T

    def read(self, name):
        return self.arrays[name]


@functools.cache
def setting():
    weighted = Weighted()
    return families.load(weighted, CFG), weighted.source


def lesson():
    a = {k: jnp.asarray(v, jnp.int32) for k, v in numbers()[0].items() if not k.startswith(("grad", "param"))}
    ids, counts = a["input_ids"], a["labels"] != -100
    at = jnp.broadcast_to(jnp.arange(256)[None], ids.shape)
    real = (at < jnp.sum(a["patch_lens"], axis=1, keepdims=True)).astype(jnp.int32)
    suffix = Suffix(a["expanded_input_ids"], jnp.zeros(2, jnp.int32))
    batch = Batch(ids, at, real, jnp.where(counts, a["labels"], 0), counts, suffix=suffix)
    return Lesson(batch, a["original_input_ids"], a["patch_lens"])


@functools.cache
def graded(spaces, official=True):
    how = Stage1(spaces=tuple(range(20, 60)) if spaces else (), official_means=official)

    def loss(p, source, weights):
        return byteify.stage1(p, source, lesson(), weights, cfg=CFG, how=how, eos=299)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def check_gradients(run, grads):
    found = families.ExportSource(CFG, grads)
    prefix = f"grad.{run}."
    names = [k.removeprefix(prefix) for k in numbers()[0] if k.startswith(prefix)]
    assert len(names) >= 4
    for name in names:
        official = numbers()[0][prefix + name]
        ours = found.read(published(name))
        np.testing.assert_allclose(ours, official, atol=1e-3 * np.abs(official).max(), rtol=0, err_msg=name)


RUNS = {
    "stage1_script": Weights(),
    "stage1_exact": Weights(),
    "only_local_encoder": Weights(4.0, 0.0, 0.0, 0.0),
    "only_ce": Weights(0.0, 1.0, 0.0, 0.0),
    "only_local_decoder": Weights(0.0, 0.0, 1.0, 0.0),
    "only_boundary": Weights(0.0, 0.0, 0.0, 1.0),
}


@pytest.mark.parametrize("run", RUNS)
def test_stage_1_equals_the_official_trainer(run):
    weights = jax.tree.map(jnp.float32, RUNS[run])
    (loss, parts), grads = graded(run == "stage1_script")(*setting(), weights)
    official = numbers()[1][run]
    np.testing.assert_allclose(loss, official["loss"], rtol=1e-5)
    np.testing.assert_allclose(parts["boundary"], official["bolmo/boundary_loss"], rtol=1e-5)
    np.testing.assert_allclose(parts["encoder"], official["bolmo/local_encoder_loss_lookahead_3"], rtol=1e-5)
    np.testing.assert_allclose(parts["cross_entropy"], official["ce_final"], rtol=1e-5)
    check_gradients(run, grads)
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grads["main"]))


def test_stage_2_equals_the_official_trainer():
    """Whose patches beyond the number of subword tokens are lost, as where there is no room for them."""
    batch = lesson().bytes.replace(marks=lesson().marks)
    cfg = dataclasses.replace(CFG, capacity=lesson().lengths.shape[1] / batch.ids.shape[1])

    def loss(p):
        return byteify.stage2(p, batch, cfg=cfg, official_means=True)

    (loss, parts), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(setting()[0])
    official = numbers()[1]["stage2"]
    np.testing.assert_allclose(loss, official["loss"], rtol=1e-5)
    np.testing.assert_allclose(parts["cross_entropy"], official["ce_final"], rtol=1e-5)
    np.testing.assert_allclose(parts["boundary"], official["bolmo/boundary_loss"], rtol=1e-5)
    check_gradients("stage2", grads)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads["main"]))


def test_clean_means_are_over_what_counts():
    (_, parts), _ = graded(False, official=False)(*setting(), jax.tree.map(jnp.float32, Weights()))
    official = numbers()[1]["stage1_exact"]
    np.testing.assert_allclose(parts["cross_entropy"], official["bolmo/ce_loss"], rtol=1e-5)
    np.testing.assert_allclose(parts["decoder"], official["bolmo/local_decoder_loss_simple"], rtol=1e-5)


def test_divergence_of_coins():
    a, b = jnp.log(jnp.array([0.3, 0.999, 1e-8])), jnp.log(jnp.array([0.6, 0.5, 1e-6]))
    p, q = np.exp(np.float64(a)), np.exp(np.float64(b))
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(byteify.binary_divergence(a, b), expected, rtol=1e-3, atol=1e-9)
    grads = jax.vmap(jax.grad(byteify.log1mexp))(jnp.array([-1e-6, -0.7, -50.0]))
    np.testing.assert_allclose(grads, [-1e6, -1 / (np.exp(0.7) - 1), -np.exp(-50.0)], rtol=1e-3)
