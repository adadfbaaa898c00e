"""Logits and log-probabilities of given tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import atom_jax
from atom_jax.inference import score
from atom_jax.models import transformer
from atom_jax.nn import scoring
from atom_jax.typing import AtomError


@pytest.fixture(scope="module", params=list(transformer.FAMILIES))
def case(request, golden):
    directory = golden / "hf_tiny" / request.param
    return atom_jax.load(directory), load_file(directory / "io.safetensors")


def test_padding_on_the_left_equals_the_official_logits(case):
    lm, io = case
    real = io["leftpad_attention_mask"] == 1
    out = atom_jax.apply(lm, io["input_ids"], real)
    assert out.logits.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out.logits)[real], io["leftpad_logits"][real], atol=2e-4)


def test_padding_on_either_side_changes_nothing(case):
    lm, io = case
    ids = io["input_ids"][:1, :20]
    plain = np.asarray(atom_jax.apply(lm, ids).logits)[0]
    scores = np.asarray(score.logprobs(lm, ids))[0]
    for left, right in ((0, 9), (9, 0), (4, 5)):
        padded = np.pad(ids, ((0, 0), (left, right)), constant_values=-1)
        out = np.asarray(atom_jax.apply(lm, padded, padded >= 0).logits)[0, left : left + 20]
        np.testing.assert_allclose(out, plain, atol=1e-4)
        padded_scores = np.asarray(score.logprobs(lm, padded, padded >= 0))[0]
        np.testing.assert_allclose(padded_scores[left : left + 19], scores, atol=1e-4)
        assert np.all(np.delete(padded_scores, np.arange(left, left + 19)) == 0)


def test_log_probabilities_in_blocks_equal_the_softmax(case, monkeypatch):
    lm, io = case
    # A configuration of its own, because the block size is fixed when it compiles.
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_length=255))
    monkeypatch.setattr(scoring, "LIMIT", 32 * lm.config.vocab_size)
    ids = io["input_ids"]
    everything = jax.nn.log_softmax(jnp.asarray(io["logits"]), axis=-1)
    expected = np.take_along_axis(np.asarray(everything)[:, :-1], ids[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(score.logprobs(lm, ids), expected, atol=2e-4)
    assert score.logprobs(lm, ids[:, :1]).shape == (2, 0)


def test_one_shape_compiles_once(case, monkeypatch):
    lm, io = case
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_length=254))
    traced, hidden = [], transformer.hidden
    monkeypatch.setattr(transformer, "hidden", lambda *a, **k: traced.append(1) or hidden(*a, **k))
    for start in range(3):
        atom_jax.apply(lm, io["input_ids"][:, start : start + 8])
    assert len(traced) == 1


@pytest.mark.parametrize(
    "ids, mask, words",
    [
        (np.zeros((1, 4), np.float32), None, "integers"),
        (np.zeros(4, np.int32), None, r"\[B, T\]"),
        (np.zeros((0, 4), np.int32), None, r"\[B, T\]"),
        (np.full((1, 4), 96), None, "token id 96 is outside the vocabulary of 96"),
        (np.full((1, 4), -1), None, "token id -1"),
        (np.zeros((1, 4), np.int32), np.ones((1, 3), bool), "mask has shape"),
        (np.zeros((1, 4), np.int32), np.array([[1, 0, 1, 1]], bool), "contiguous"),
    ],
)
def test_bad_input_is_one_sentence(golden, ids, mask, words):
    lm = atom_jax.load(golden / "hf_tiny" / "llama")
    with pytest.raises(AtomError, match=words):
        atom_jax.apply(lm, ids, mask)
