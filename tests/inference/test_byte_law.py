"""Exact probabilities of bytes under a tiny model over subwords, against sums over covers that are read apart."""

import dataclasses

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.inference.byte_law import ByteLaw, canonical_of
from atom_jax.inference.score import apply, logprobs
from atom_jax.models import transformer
from atom_jax.tokenizers import BolmoTokenizer, ByteTokenizer
from atom_jax.typing import LM, AtomError
from tests.transfer.numbers import tokenizer

CFG = transformer.TransformerConfig(
    d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, max_length=64, vocab_size=800,
    tie_embeddings=False,
)  # fmt: skip
TEXT = " the vers\u00e9 12."


@pytest.fixture(scope="module")
def lm():
    cfg = dataclasses.replace(CFG, vocab_size=704, eos_ids=(0,))
    p = params.init(jax.random.key(0), transformer.spec(cfg))
    p["unembed"] = p["unembed"] * 8  # far from uniform
    return LM(cfg, p, tokenizer("gpt2like"))


def token_laws(lm, contexts):
    """The model's own laws after these tokens, padded with zeros in one call: log-probabilities [contexts, ids]."""
    ids = np.full((len(contexts), 24), -1)
    mask = np.zeros(ids.shape, bool)
    for row, context in enumerate(contexts):
        ids[row, : len(context) + 1] = [0, *context]
        mask[row, : len(context) + 1] = True
    logits = np.asarray(apply(lm, ids, mask).logits, np.float64)
    logits = logits[np.arange(len(contexts)), mask.sum(1) - 1]
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def brute(lm, text):
    """log P of every beginning of a text: sums over what the tokenizer makes of shorter ones, and one more token."""
    canonical = canonical_of(lm)
    beginnings = [tuple(lm.tokenizer.encode(text[:i]).tolist()) for i in range(len(text))]
    laws = token_laws(lm, beginnings)[:, : canonical.view.size]
    every = np.arange(canonical.view.size)
    rows = {ids: np.where(canonical.follows(ids, every), law, -np.inf) for ids, law in zip(beginnings, laws)}
    rows = {ids: law - np.logaddexp.reduce(law) for ids, law in rows.items()}
    path = {(): 0.0}

    def log_p(ids):
        if ids not in path:
            path[ids] = log_p(ids[:-1]) + rows[ids[:-1]][ids[-1]]
        return path[ids]

    out = []
    for n in range(1, len(text) + 1):
        data, parts = text[:n], []
        for i in range(n):
            rest = data[i:].encode()
            ids = [j for piece, js in canonical.view.ids.items() if piece.startswith(rest) for j in js]
            context = beginnings[i]
            if all(context[:k] in rows for k in range(len(context))):
                parts.append(log_p(context) + np.logaddexp.reduce(rows[context][ids], initial=-np.inf))
        out.append(np.logaddexp.reduce(parts))
    return np.array(out)


def test_bytes_equal_sums_over_covers(lm):
    text = " the version 12, theirs."
    found = atom_jax.byte_logprobs(lm, text)
    assert found.dtype == np.float64 and found.shape == (len(text),)
    np.testing.assert_allclose(np.cumsum(found), brute(lm, text), atol=2e-5)
    ids = lm.tokenizer.encode(text)
    tokens = np.asarray(logprobs(lm, np.concatenate([[0], ids])[None])).sum()
    assert tokens < found.sum() < 0
    # Dropping what can't be differs, but not by much.
    dropped = atom_jax.byte_logprobs(lm, text, invalid="drop")
    assert 0 < np.abs(dropped - found).max() < 2


def test_one_byte_after_another_says_the_same(lm):
    data = TEXT.encode()
    expected = atom_jax.byte_logprobs(lm, TEXT)
    law, found = ByteLaw.begin(lm), []
    for byte in data:
        assert np.exp(law.next).sum() == pytest.approx(1)
        found.append(law.next[byte])
        law = law.push(byte)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    # From a prompt that ends inside a character; an earlier law goes on from its own place.
    inside = data.index(b"\xc3") + 1
    later = ByteLaw.begin(lm, data[:inside])
    np.testing.assert_allclose(later.next[data[inside]], expected[inside], atol=2e-5)
    assert later.push(data[inside]).next[data[inside + 1]] == pytest.approx(expected[inside + 1], abs=2e-5)
    assert later.push(0xA8).next.shape == (257,)


def test_bytes_of_a_byte_model():
    cfg = dataclasses.replace(CFG, vocab_size=264)
    lm = LM(cfg, params.init(jax.random.key(0), transformer.spec(cfg)), ByteTokenizer())
    found = atom_jax.byte_logprobs(lm, "abc")
    ids = np.array([[256, *b"abc"]])
    np.testing.assert_allclose(found, np.asarray(logprobs(lm, ids))[0], atol=1e-6)


def test_bad_input(lm):
    with pytest.raises(AtomError, match="expected renormalise or drop"):
        atom_jax.byte_logprobs(lm, "a", invalid="keep")
    with pytest.raises(AtomError, match="no tokenizer"):
        atom_jax.byte_logprobs(dataclasses.replace(lm, tokenizer=None), "a")
    with pytest.raises(AtomError, match="no bytes that could be compared"):
        ByteLaw.begin(dataclasses.replace(lm, tokenizer=BolmoTokenizer()), "a")
    with pytest.raises(AtomError, match="no token that begins"):
        ByteLaw.begin(dataclasses.replace(lm, tokenizer=tokenizer("gemmalike"), config=CFG), "a")
    with pytest.raises(AtomError, match="exceeds the 64 positions"):
        atom_jax.byte_logprobs(lm, "x y " * 80)
    assert atom_jax.byte_logprobs(lm, "").shape == (0,)
