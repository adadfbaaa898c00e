"""Places of what was read: given once or many times over, near or far, they leave the same."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax.kvcache.lasting.chosen import _before_rope
from atom_jax.kvcache.lasting.layer import moved, turned
from atom_jax.kvcache.layer import Call
from atom_jax.kvcache.memory import layers
from atom_jax.lasting.reader import Reader
from atom_jax.models import registry
from atom_jax.nn import rope
from atom_jax.nn.attention import Tokens
from atom_jax.session import laid_out
from atom_jax.session.session import Session
from tests.lasting.naive import Naive
from tests.lasting.test_lasting_reading import PROMPT, TEXTS, YARN, lm_of, opened

OF = (10000.0, YARN)


def by_hand(x, places):
    """Keys [h, s, k] turned to places in complex numbers, times the factor of their scaling."""
    freq, factor = rope.frequencies(x.shape[-1], *OF)
    assert factor > 1.1
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.asarray(places)[:, None] * np.asarray(freq)) * factor
    return np.concatenate([z.real, z.imag], axis=-1)


def test_plain_keys_are_turned_to_their_places_and_on_from_there():
    rng = np.random.default_rng(0)
    k, places = rng.normal(size=(1, 2, 9, 8)).astype(np.float32), np.arange(9) * 7
    at = turned(jnp.asarray(k), jnp.asarray(places)[None], 8, OF)
    np.testing.assert_allclose(at[0], by_hand(k[0], places), atol=1e-5)
    # On by 350 in fifty steps, and back at once.
    far = at
    for _ in range(50):
        far = moved(far, jnp.full((1, 1), 7), 8, OF)
    np.testing.assert_allclose(far[0], by_hand(k[0], places + 350), atol=1e-4)
    np.testing.assert_allclose(moved(far, jnp.full((1, 1), -350), 8, OF), at, atol=1e-4)


def test_queries_are_turned_back_to_what_they_were():
    q, places = np.random.default_rng(0).normal(size=(1, 2, 3, 5, 8)).astype(np.float32), np.arange(5)[None] * 11
    there = np.stack([[by_hand(x, places[0]) for x in heads] for heads in q[0]])[None].astype(np.float32)
    tokens = Tokens(jnp.asarray(places), jnp.ones_like(places))
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Call))
    call = Call(**fields | {"q": jnp.asarray(there), "tokens": tokens, "rotary": 8, "rope": OF})
    np.testing.assert_allclose(_before_rope(call), q, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_window_that_is_given_places_is_the_cache_of_the_model(tmp_path, scanned, name):
    lm, text = lm_of(name), TEXTS[4][:12].tolist()
    memory = opened(tmp_path / "m", name)
    memory.read(np.array(text))
    front, session = memory.front(), Session.prefill(lm, [text])
    (given,), (own,) = layers(front), layers(session.memory)
    for one, other in zip((given.k, given.v), (own.k, own.v)):
        np.testing.assert_allclose(one[..., :12, :], other[..., :12, :], rtol=1e-5, atol=1e-5)
    after = Session.prefill(lm, PROMPT.tolist(), memory=front).logits
    np.testing.assert_allclose(after, session.extend(PROMPT.tolist()).logits, rtol=1e-5, atol=1e-5)


def test_after_fifty_parts_all_is_as_if_places_were_given_once(tmp_path):
    name, parts, part = "llama", 50, 8
    lm = lm_of(name)
    ids = np.random.default_rng(3).integers(0, 256, parts * part).astype(np.int32)
    memory = opened(tmp_path / "m", name, law="log:entries=3,block=8")
    naive, said = Naive(lm, dataclasses.replace(memory.settings, part=part)), []
    naive.run = lambda *given: said.append(Naive.run(naive, *given)) or said[-1]
    naive.read(ids)
    reader = Reader(lm, part, 2)
    state = reader.begin(0)
    for _ in range(parts):
        state, _ = reader.read(state, ids)
    assert state.tokens == len(ids) and len(said) == parts
    held = reader.inside.layers_of(state.memory, np.arange(lm.config.n_layers))
    for found, wanted in ((held.k, said[-1][1]), (held.v, said[-1][2])):
        np.testing.assert_allclose(found[:, 0].swapaxes(1, 2), wanted, atol=1e-4)
    logits = registry.of(lm.config).logits(laid_out.scanned(lm), jnp.asarray(state.x_td)[None], cfg=lm.config)[0]
    np.testing.assert_allclose(logits, said[-1][0], atol=1e-4 * np.abs(said[-1][0]).max())


def test_with_nothing_read_no_bit_differs_from_the_model(tmp_path):
    lm, memory = lm_of("llama"), opened(tmp_path / "m", "llama")
    found = atom_jax.apply(lm, PROMPT, memory=memory).logits
    np.testing.assert_array_equal(found, atom_jax.apply(lm, PROMPT).logits)
