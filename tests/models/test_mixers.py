"""The table of mixers, and a new one that a single call registers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import atom_jax
from atom_jax.chunking.rules.cosine import Cosine
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.models import hnet, mixers, registry, stack
from atom_jax.models.hnet.examples import small
from atom_jax.models.mixers import MIXERS, Mixer, register
from atom_jax.nn import ngrams
from atom_jax.params import ParamSpec, normal
from atom_jax.typing import LM, AtomError
from tests.contract.cells import padded
from tests.models.tiny_units import rows, stream, weights


@struct.dataclass
class Mean:
    """Sum f32 [b, d] and count i32 [b] of the inputs of a row."""

    total: jax.Array
    count: jax.Array


class Average(Mixer):
    """The mean of all inputs so far, projected."""

    def spec(self, width, out_scale):
        return {"w": ParamSpec((width.d, width.d), ("embed", None), normal(out_scale * width.d**-0.5))}

    def empty(self, width, b, capacity, dtype):
        return Mean(jnp.zeros((b, width.d)), jnp.zeros(b, jnp.int32))

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        real = (context.tokens.segments > 0)[..., None]
        total = jnp.cumsum(jnp.where(real, y_btd, 0.0), axis=1)
        count = jnp.cumsum(real, axis=1)
        if state is not None:
            total, count = total + state.total[:, None], count + state.count[:, None, None]
            state = Mean(total[:, -1], count[:, -1, 0])
        return (total / jnp.maximum(count, 1)) @ p["w"], state, {}

    def operations(self, width, positions):
        return 0.0

    def describe(self, width):
        return "means"


@pytest.fixture
def average(monkeypatch):
    monkeypatch.setattr(mixers, "MIXERS", MIXERS.copy())
    for module in (mixers, stack):
        monkeypatch.setattr(module, "MIXERS", mixers.MIXERS)
    register("a", Average())
    register("A", Average(mlp=True))


def test_a_new_mixer_is_one_entry(average):
    cfg = small({"rule": Fixed(2), "pool": "mean"}, layout=("a2", "A1T1", "a1m1"))
    p, batch = weights(cfg), rows([[stream(20)], [stream(9, 3), stream(8)]], 24)
    assert p["stage0"]["encoder"]["0"]["mixer"]["w"].shape == (2, 16, 16)
    value, grads = jax.jit(jax.value_and_grad(lambda p: hnet.apply(p, batch, cfg=cfg)[0].logits.std()))(p)
    assert np.isfinite(value) and np.abs(grads["stage0"]["encoder"]["0"]["mixer"]["w"]).max() > 0
    lm = LM(cfg, p, None)
    prompts = [list(range(60, 71)), [70, 32, 71]]
    made = atom_jax.generate(lm, prompts, 12).ids
    written = [prompt + new for prompt, new in zip(prompts, made)]
    likely = np.asarray(atom_jax.apply(lm, *padded(written, 24)).logits).argmax(-1)
    for prompt, new, row in zip(prompts, made, likely):
        np.testing.assert_array_equal(new, row[len(prompt) - 1 :][:12])
    assert registry.of(cfg).flops(cfg, 32) > 0
    assert "means" in dict(registry.of(cfg).describe(cfg))["stage 0"]


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (("f1", "F1", "f1"), ["2 fast weights of 8 x 8"]),
        (("t1", "l1L1", "t1"), ["2 heads with landmarks of blocks of 2,", "of blocks of 2, of which 1 are read"]),
        (("h1", "T1h1", "h1t1"), ["6 tables of 11 rows for n-grams of 2 to 4 ids"]),
        (("t1", "e1E1", "t1"), ["2 heads that see 3 positions and the 2 nearest of 4 older ones"]),
        (("t1", "s1S1", "t1"), ["2 heads that see 3 positions and 2 slots"]),
        (("n1", "N1k1", "t1"), ["2 neural memories of 8 x 16", "a table of 36 values, 6 read by each position"]),
    ],
)
def test_layers_with_a_memory_read_and_write(layout, said, monkeypatch):
    monkeypatch.setitem(MIXERS, "k", mixers.ProductKeys(keys=6, heads=2, nearest=3))
    monkeypatch.setitem(MIXERS, "h", mixers.Ngrams(ngrams.Tables(11, heads=2, longest=4, channels=3)))
    for letter in "sS":
        monkeypatch.setitem(MIXERS, letter, mixers.Slots(letter == "S", near=3, count=2, alike=0.5))
    for letter in "eE":
        monkeypatch.setitem(MIXERS, letter, mixers.KnnAttention(letter == "E", near=3, size=4, nearest=2))
    monkeypatch.setitem(MIXERS, "l", mixers.Landmark(every=2))
    monkeypatch.setitem(MIXERS, "L", mixers.Landmark(True, every=2, nearest=1))
    cfg = small({"rule": Fixed(2), "pool": "mean"}, layout=layout)
    lm = LM(cfg, weights(cfg), None)
    one, other = stream(20), stream(17, 5)
    apply = jax.jit(lambda batch: hnet.apply(lm.params, batch, cfg=cfg)[0].logits)
    packed = apply(rows([[one[:12], other[:9]]], 24))[0, :21]
    apart = [apply(rows([[x]], 24))[0, : len(x)] for x in (one[:12], other[:9])]
    np.testing.assert_allclose(packed, np.concatenate(apart), atol=1e-4)
    made = atom_jax.generate(lm, [one[:7].tolist(), other.tolist()], 8).ids
    written = [[*prompt, *new] for prompt, new in zip((one[:7].tolist(), other.tolist()), made)]
    likely = np.asarray(atom_jax.apply(lm, *padded(written, 32)).logits).argmax(-1)
    for n, new, row in zip((7, 17), made, likely):
        np.testing.assert_array_equal(new, row[n - 1 :][:8])
    stage = dict(registry.of(cfg).describe(cfg))["stage 1"]
    assert all(words in stage for words in said)
    assert registry.of(cfg).flops(cfg, 32) > 0
    published = small({"rule": Cosine(target=2.0), "mix": "ema", "confidence": True}, layout=layout)
    with pytest.raises(AtomError, match="product keys, hashed n-grams or Transformer-XL layers"):
        hnet.published.to_hf(published, "float32")


def test_letters_are_taken_once():
    for letter in ("m", "ab", "3"):
        with pytest.raises(AtomError, match="no other kind of layer"):
            register(letter, Average())
    with pytest.raises(AtomError, match="layout 'a2'"):
        stack.parse("a2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": ("t1", "T1", "t1"), "n_heads": (3, 2)}, "n_heads: 3 heads do not divide the width 16 of stage 0"),
        ({"layout": ("l1", "T1", "t1")}, "window: landmark attention in stage 0 has none, got 5"),
        ({"layout": ("e1", "T1", "t1")}, "window: layers of kNN attention in stage 0 have their own, got 5"),
        ({"rotary_dim": (4, 10)}, "rotary_dim: expected an even number up to 8 in stage 1, got 10"),
        ({"d_intermediate": (24, 0)}, "d_intermediate: stage 1 has layers with an MLP"),
    ],
)
def test_layers_say_what_they_need(change, words):
    cfg = small({"rule": Fixed(2), "pool": "mean"})
    with pytest.raises(AtomError, match=words):
        dataclasses.replace(cfg, **change)
