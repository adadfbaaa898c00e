"""Tokenizers of images against official numbers, and what holds for all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax import params
from atom_jax.models import image_tokens, registry
from atom_jax.models.image_tokens import (
    FSQ,
    VQ,
    Halting,
    ImageTokensConfig,
    Nested,
    Rounds,
    Told,
    Whole,
    forward,
    lengths,
    rounds,
)
from atom_jax.nn import vit
from atom_jax.nn.attention import Tokens, mask
from atom_jax.typing import AtomError
from tests.models import tiny_images

EXAMPLES = registry.KINDS["image_tokens"].examples()


@pytest.fixture(scope="module")
def flextok(golden):
    return load_file(golden / "vision" / "flextok.safetensors")


@pytest.mark.parametrize("name", ["l64000", "l60", "l1000"])
def test_finite_scalar_quantisation_is_flextoks(flextok, name):
    w = {k.removeprefix(f"fsq.{name}."): v for k, v in flextok.items() if k.startswith(f"fsq.{name}.")}
    fsq = FSQ(tuple(map(int, w["levels"])))
    found = fsq({}, jnp.asarray(w["z"]))
    np.testing.assert_allclose(fsq.bounded(jnp.asarray(w["z"])), w["bound"], atol=1e-5)
    np.testing.assert_allclose(found.z, w["codes"], atol=1e-6)
    np.testing.assert_array_equal(found.index, w["tokens"])
    np.testing.assert_allclose(fsq.vectors({}, found.index), w["back"], atol=1e-6)
    grad = jax.grad(lambda z: jnp.sum(fsq({}, z).z * w["cot"]))(jnp.asarray(w["z"]))
    np.testing.assert_allclose(grad, w["grad"], atol=1e-5)


def test_the_two_bounds_differ_for_a_few_codes(flextok):
    z = jax.random.normal(jax.random.key(0), (4000, 6))
    a, b = (FSQ(bound=bound)({}, z).index for bound in ("flextok", "elastic"))
    assert 0.005 < float(jnp.mean(a != b)) < 0.03
    levels = np.array(FSQ().levels)
    half, odd = (levels - 1) * (1 - 1e-3) / 2, np.where(levels % 2, 0, 0.5)
    wanted = np.tanh(np.asarray(z) + np.tan(odd / half)) * half - odd
    np.testing.assert_allclose(FSQ(bound="elastic").bounded(z), wanted, atol=1e-5)


def test_lengths_are_drawn_as_by_flextok(flextok):
    for rule in ("uniform", "pow2", "uniform_pow2"):
        found = lengths.drawn(jax.random.key(1), 20_000, rule, 1, 16)
        counts, wanted = np.bincount(found, minlength=17), flextok[f"drop.count_{rule}"]
        assert ((counts > 0) == (wanted > 0)).all()
        assert (np.abs(counts - wanted) <= 6 * np.sqrt(wanted)).all()
    # No power of two: never more than there are.
    assert set(np.unique(lengths.drawn(jax.random.key(2), 500, "uniform_pow2", 2, 6))) == {2, 4, 6}


def test_dropped_vectors_and_masks_are_flextoks(flextok):
    for i, k in enumerate(flextok["drop.keep"]):
        z, keep = jnp.asarray(flextok[f"drop.in{i}"]), lengths.first(jnp.full(2, int(k)), 8)
        out = forward.replaced(z, keep, jnp.asarray(flextok["drop.mask_token"]))
        np.testing.assert_array_equal(out, flextok[f"drop.out{i}"])
    # Two images of one row there, with 5 and 3 registers, then padding, which none sees.
    one, two = (forward.places(9, (1, r), None, causal=True).positions for r in (5, 3))
    positions = jnp.concatenate([one, two, jnp.zeros((1, 6), jnp.int32)], axis=1)
    place = Tokens(positions, jnp.asarray(flextok["mask.ids"])[None])
    real = flextok["mask.ids"] >= 0
    np.testing.assert_array_equal(mask(place, place, None)[0] & real[:, None], flextok["mask.prefix"].astype(bool))


def test_the_first_tokens_have_the_first_places_as_in_flextok(flextok):
    cfg = ImageTokensConfig(size=8, registers=16, d_model=6, d_ff=8, n_heads=2, decoder_layers=1)
    p = params.init(jax.random.key(0), image_tokens.spec(cfg))["decoder"]
    z, keep = jax.random.normal(jax.random.key(1), (1, 5, cfg.quantiser.width)), jnp.ones((1, 5), bool)

    @jax.jit
    def both(p, z):
        tables = flextok["reg.table"], flextok["reg.nested5"][0], flextok["reg.table"][5:10]
        return [image_tokens.decode({"decoder": p | {"registers": jnp.asarray(x)}}, z, keep, cfg) for x in tables]

    whole, first, others = both(p, z)
    np.testing.assert_array_equal(whole, first)
    assert (whole != others).any()


@pytest.fixture(scope="module")
def alit(golden):
    numbers = load_file(golden / "vision" / "alit.safetensors")
    cfg = ImageTokensConfig(size=64, registers=12, d_model=24, n_heads=2, mask="full", quantiser=VQ(32, 6),
                            length=Rounds(3))  # fmt: skip
    return numbers, cfg, tiny_images.alit(numbers)


@functools.partial(jax.jit, static_argnames="cfg")
def alit_rounds(p, x, draws_nbp, ids, *, cfg):
    """Every round, where patches are hidden that were drawn and whose code has a probability of 0.08."""

    def step(x, inputs):
        i, drawn = inputs
        one = rounds.next_round(p, x, i, cfg)
        sure = jnp.take_along_axis(jax.nn.softmax(one.patches), ids[..., None], axis=2)[..., 0]
        x = rounds.hidden(p, one.x, (drawn > 0) & (sure >= 0.08))
        return x, (one.x, one.patches, one.found.loss_of(one.keep))

    return jax.lax.scan(step, rounds.begin(p, x, cfg), (jnp.arange(3), draws_nbp))[1]


def test_rounds_are_alits(alit):
    w, cfg, p = alit
    x, ids = tiny_images.inputs(w), jnp.asarray(w["base.ids"])
    drawn = jnp.stack([w[f"drop{i}"] for i in range(3)])
    states, logits, _ = alit_rounds(p, x, drawn, ids, cfg=cfg)
    codes = w["w.base_tokenizer.emb.weight"]
    for i in range(3):
        theirs = w[f"it{i}.image_and_latent_all_tokens_{i}"]
        np.testing.assert_allclose(states[i, :, 1 : 1 + theirs.shape[1]], theirs, atol=1e-5)
        code = jax.nn.softmax(logits[i, :, :32]) @ codes
        image = np.einsum("bpe,echw->bphwc", code, w["w.base_tokenizer.dec.weight"])
        image = vit.unpatched(jnp.asarray(image).reshape(2, 32, -1), 4, 8, 64)
        image = np.asarray(image) + w["w.base_tokenizer.dec.bias"]
        np.testing.assert_allclose(image.transpose(0, 3, 1, 2), w[f"it{i}.reconstructed_imgs_{i}"], atol=1e-5)


@functools.partial(jax.jit, static_argnames="cfg")
def alit_learns(p, x, draws_nbp, ids, codes, *, cfg):
    """The official loss, its parts by name and round, and gradients: cross-entropy of the base's codes, weighted by
    rounds; the squared error of their mean; and the quantiser's."""

    def loss(p):
        _, logits, quantisation = alit_rounds(p, x, draws_nbp, ids, cfg=cfg)
        logp = jax.nn.log_softmax(logits)
        right = jnp.take_along_axis(logp, jnp.broadcast_to(ids, logp.shape[:3])[..., None], axis=-1)[..., 0]
        nll = -jnp.mean(right, axis=(1, 2))
        code = jnp.mean(jnp.square(jnp.exp(logp) @ codes - codes[ids][None]), axis=(1, 2, 3))
        total = jnp.sum(jnp.array(cfg.length.weights[:3]) * nll + code + quantisation)
        return total, {"nll": nll, "code": code, "quantization": quantisation}

    return jax.value_and_grad(loss, has_aux=True)(p)


def test_rounds_learn_as_alits(alit):
    w, cfg, p = alit
    draws = jnp.stack([w[f"train.drop{i}"] for i in range(3)])
    codes = jnp.asarray(w["w.base_tokenizer.emb.weight"])
    (loss, parts), g = alit_learns(p, tiny_images.inputs(w), draws, jnp.asarray(w["base.ids"]), codes, cfg=cfg)
    for name, found in parts.items():
        np.testing.assert_allclose(found, [w[f"train.{name}_loss_{i}"] for i in range(3)], atol=1e-5)
    np.testing.assert_allclose(loss, w["train.loss"], rtol=1e-6)
    encoder, down = g["encoder"], g["decoder"]["down"]["w"]
    theirs = {
        "decoder.ffn.2.weight": down.T, "pre_quantizer_mlp.weight": encoder["outlet"]["w"].T,
        "encoder.transformer.0.attn.in_proj_weight": encoder["blocks"]["qkv"][0].reshape(24, 72).T,
        "latent_tokens": encoder["registers"], "timestep_embedding": encoder["rounds"],
        "quantize.embedding.weight": g["quantiser"]["codebook"],
    }  # fmt: skip
    for name, found in theirs.items():
        np.testing.assert_allclose(found, w[f"g.{name}"], atol=1e-5)


@pytest.mark.parametrize("registers", [16, 48])
def test_halting_is_karls_with_every_row_by_its_own_mask(golden, registers):
    w = load_file(golden / "vision" / "karl.safetensors")
    length = Halting(tuple(map(float, w["bins"].astype(np.float64).round(6))), halt=0.6)
    cfg = ImageTokensConfig(size=64, registers=registers, d_model=24, n_heads=2, mask="full", quantiser=VQ(32, 6),
                            length=length)  # fmt: skip
    p, x = tiny_images.karl(w, registers), tiny_images.inputs(w)

    @jax.jit
    def once(p, x, bins):
        x_brd = forward.states(p, x, cfg, None, p["encoder"]["bins"][bins])
        return length.once(p, x, bins, cfg), forward.latents(p, x_brd, cfg)

    for error in ("0.03", "0.2"):
        theirs = {k.rpartition(".")[2]: v for k, v in w.items() if k.startswith(f"T{registers}_e{error}.")}
        bins = length.bin_of(jnp.full(2, float(error)))
        np.testing.assert_allclose(np.array(length.bins)[bins], theirs["bin"][:, 0, 0], atol=1e-6)
        one, z = once(p, x, bins)
        np.testing.assert_allclose(z, theirs["factorized"], atol=1e-5)
        np.testing.assert_allclose(jax.nn.sigmoid(one.halt), theirs["halt_prob"], atol=1e-5)
        np.testing.assert_array_equal(one.found.index, theirs["codes"])
        np.testing.assert_allclose(one.patches, theirs["logits_rows_alone"], atol=1e-5)


@functools.cache
def made(name):
    """A tokenizer with random parameters that are large, and four images."""
    cfg = EXAMPLES[name]
    p = params.init(jax.random.key(0), image_tokens.spec(cfg))
    p = jax.tree.map(lambda x: x if x.ndim < 2 else 3 * x, p)
    images = jax.random.uniform(jax.random.key(1), (4, cfg.size, cfg.size, cfg.channels))
    images = images * jnp.array([1.0, 0.1, 0.5, 0.0]).reshape(4, 1, 1, 1)
    return cfg, p, vit.patches(images, cfg.patch)


@functools.partial(jax.jit, static_argnames="cfg")
def choices(p, x, *, cfg):
    return cfg.length.choices(p, x, cfg)


decode = jax.jit(image_tokens.decode, static_argnames="cfg")
encode = jax.jit(image_tokens.encode, static_argnames="cfg")


@pytest.mark.parametrize("name", EXAMPLES)
def test_rows_of_a_batch_are_what_they_are_alone(name):
    cfg, p, x = made(name)
    one = choices(p, x, cfg=cfg)
    two = choices(p, x.at[1:].set(1 - 3 * x[1:][::-1]), cfg=cfg)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 0], b[:, 0]), one, two)
    assert not np.array_equal(one.patches[:, 1:], two.patches[:, 1:])
    assert one.tokens.shape == (len(cfg.length.labels(cfg)), 4)
    if one.index is not None:
        np.testing.assert_array_equal(jnp.sum(one.index >= 0, axis=-1), one.tokens)


@pytest.mark.parametrize("name", ["flex", "vector", "elastic"])
def test_images_depend_on_kept_tokens_alone(name):
    cfg, p, _ = made(name)
    z, keep = jax.random.normal(jax.random.key(2), (2, 4, 3)), lengths.first(jnp.array([1, 3]), 4)
    one = decode(p, z, keep, cfg=cfg)
    other = jnp.where(keep[..., None], z, 9.0 - z)
    np.testing.assert_array_equal(one, decode(p, other, keep, cfg=cfg))
    assert (one[1] != decode(p, z.at[1, 2].add(1.0), keep, cfg=cfg)[1]).any()


def test_registers_do_not_see_later_ones_and_encoding_is_the_same_for_all_lengths():
    cfg, p, x = made("flex")
    one = encode(p, x, cfg=cfg)
    p = p | {"encoder": p["encoder"] | {"registers": p["encoder"]["registers"].at[2:].add(1.0)}}
    two = encode(p, x, cfg=cfg)
    np.testing.assert_array_equal(one[:, :2], two[:, :2])
    assert (one[:, 2:] != two[:, 2:]).all(axis=-1).any()
    index = choices(p, x, cfg=cfg).index
    for i in range(4):
        np.testing.assert_array_equal(index[i, :, : i + 1], index[-1, :, : i + 1])


def test_the_encoder_that_is_told_makes_other_tokens_for_other_lengths():
    cfg, p, x = made("elastic")
    assert (choices(p, x, cfg=cfg).index[1, :, 0] != choices(p, x, cfg=cfg).index[3, :, 0]).any()


def test_a_tail_halts_and_nothing_before_it():
    odds = jnp.array([[-5.0, 5, -5, 5], [5, 5, 5, 5]])
    for tail, kept in ((False, [[1, 0, 1, 0], [0] * 4]), (True, [[1, 1, 1, 0], [0] * 4])):
        np.testing.assert_array_equal(Halting(tail=tail).kept(odds), np.array(kept, bool))


@pytest.mark.parametrize("name", ["vector", "alit", "karl"])
def test_all_of_a_tokenizer_learns(name):
    cfg, p, x = made(name)
    grads = jax.jit(jax.grad(lambda p: cfg.length.train(p, x, jax.random.key(3), cfg).loss))(p)
    still = {k for k, g in params.flatten(grads).items() if not np.abs(g).max() > 0}
    assert still <= {"encoder/hidden"} and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_bad_configurations_are_refused_in_a_sentence():
    for changes, words in (
        ({"size": 10}, "patch: 4 does not divide size 10"),
        ({"n_heads": 5}, "n_heads: 5 do not divide d_model 48"),
        ({"mask": "causal"}, "mask: expected full or causal_registers, got 'causal'"),
        ({"quantiser": "fsq"}, "quantiser: expected one of FSQ, VQ, Continuous"),
        ({"length": 3}, "length: expected Whole"),
        ({"channels": 2}, "channels: expected 1 .gray. or 3 .colours., got 2"),
        ({"length": Nested(least=17)}, "length.least: there are only 16 registers, got 17"),
        ({"length": Told(least=17)}, "length.least: there are only 16 registers, got 17"),
        ({"length": Rounds(3), "mask": "full"}, "length.count: 3 rounds do not divide 16 registers"),
        ({"length": Rounds(4)}, "mask: registers that are added in rounds need full"),
        ({"length": Halting()}, "mask: registers that halt need full"),
        ({"length": Halting(step=17), "mask": "full"}, "length.step: there are only 16 registers"),
        ({"length": Whole(), "dtype": "float16"}, "dtype: expected float32 or bfloat16"),
    ):
        with pytest.raises(AtomError, match=words):
            ImageTokensConfig(**changes)
    for make, words in (
        (lambda: Nested("twice"), "rule: expected one of uniform, pow2, uniform_pow2, got 'twice'"),
        (lambda: Nested(dropped="zero"), "dropped: expected mask or vector, got 'zero'"),
        (lambda: FSQ(bound="tanh"), "bound: expected flextok or elastic, got 'tanh'"),
        (lambda: FSQ((2,) * 40), "levels: expected at least one, and fewer than 2"),
        (lambda: Halting((0.1, 0.05)), "bins: expected rising errors"),
        (
            lambda: registry.of(EXAMPLES["flex"]),
            "the model is of the kind image_tokens, which reads images, no streams of texts or frames",
        ),
    ):
        with pytest.raises(AtomError, match=words):
            make()
