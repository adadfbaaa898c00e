"""Prompts that are healed, and prompts that are read in merged tokens, with a tiny model over subwords."""

import dataclasses

import jax
import numpy as np
import pytest

from atom_jax import params
from atom_jax.inference.healed import healed
from atom_jax.inference.merged import MergedReader
from atom_jax.inference.score import apply, logprobs
from atom_jax.kvcache import policies
from atom_jax.models import registry, transformer
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.tokenizers.healing import Healer
from atom_jax.typing import LM, AtomError
from tests.transfer.numbers import tokenizer, view

CFG = transformer.TransformerConfig(
    d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, max_length=64, vocab_size=704,
    tie_embeddings=False, eos_ids=(0,),
)  # fmt: skip


@pytest.fixture(scope="module")
def lm():
    p = params.init(jax.random.key(0), transformer.spec(CFG))
    p["unembed"] = p["unembed"] * 8  # far from uniform
    return LM(CFG, p, tokenizer("gpt2like"))


def test_healed_prompts_are_the_likeliest_that_write_them(lm):
    prompts, healer = ["of the versio", "a packag", "the licens"], Healer(view("gpt2like"))
    found = healed(lm, prompts)
    for text, ids in zip(prompts, found):
        kept, rest = healer.take_back(lm.tokenizer.encode(text).tolist())
        assert rest and ids[: len(kept)] == kept
        assert lm.tokenizer.decode_bytes(ids).startswith(text.encode())
        row = np.asarray(apply(lm, np.pad(ids, (0, 24 - len(ids)))[None], np.arange(24)[None] < len(ids)).logits)[0]
        for at in range(len(kept), len(ids)):
            allowed = np.flatnonzero(healer.allowed(rest))
            assert rest and ids[at] == allowed[np.argmax(row[at - 1, allowed])]
            rest = healer.after(rest, ids[at])
        assert rest == b""
    drawn = [healed(lm, prompts, 1.0, jax.random.key(n)) for n in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    # Nothing would be left, and nothing to be taken back.
    assert healed(lm, [[5], [5, 0]]) == [[5], [5, 0]]
    with pytest.raises(AtomError, match="no tokenizer"):
        healed(dataclasses.replace(lm, tokenizer=None), [[5]])


def test_answers_after_merged_prompts(lm):
    reader = MergedReader(lm, "word", capacity=96)
    prompts, answers = ["a strange stranger, stranger still", "nothing stranger"], [" than", [40, 41, 42]]
    plain = reader.merge(prompts, 0)
    found = reader.logprobs(plain, answers)
    said = [lm.tokenizer.encode(answers[0]), np.array(answers[1])]
    for row, answer, got in zip(plain.rows, said, found):
        ids = np.append(row, answer)[None]
        np.testing.assert_allclose(got, np.asarray(logprobs(lm, ids))[0, -len(answer) :], atol=2e-5)
    merged = reader.merge(prompts)
    assert 0 < len(merged.pieces) <= 96 and merged.totals[-1] < merged.totals[0]
    # The same model with these tokens in its vocabulary, which it can't say.
    big = dataclasses.replace(CFG, vocab_size=800)
    tree = dict(lm.params)
    made = np.stack([lm.params["embed"][np.array(view("gpt2like").cut(piece))].mean(0) for piece in merged.pieces])
    slots = 704 + reader.rows.slots(merged.pieces)
    tree["embed"] = np.concatenate([tree["embed"], np.zeros((96, 16), np.float32)])
    tree["embed"][slots] = made
    tree["unembed"] = np.concatenate([tree["unembed"], np.zeros((16, 96), np.float32)], axis=1)
    assert merged.size == 700
    for row, answer, got in zip(merged.rows, said, reader.logprobs(merged, answers)):
        ids = np.append(np.append(np.arange(700), slots)[row], answer)
        logits = np.asarray(apply(LM(big, tree, None), np.pad(ids, (0, 24 - len(ids)))[None]).logits, np.float64)[0]
        logits = logits[len(row) - 1 : len(ids) - 1, :704]
        expected = logits[np.arange(len(answer)), answer] - np.logaddexp.reduce(logits, axis=1)
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_what_merged_prompts_are_not_for(lm):
    with pytest.raises(AtomError, match="there are 1, but 2 prompts"):
        reader = MergedReader(lm, "word")
        reader.logprobs(reader.merge(["a", "b"]), ["c"])
    with pytest.raises(AtomError, match="choose the dense cache"):
        MergedReader(registry.with_memory(lm, policies.parse("streaming_llm:budget=8")))
    with pytest.raises(AtomError, match="splits texts by no rule"):
        MergedReader(dataclasses.replace(lm, tokenizer=ByteTokenizer()))
    with pytest.raises(AtomError, match="transformers with a tokenizer"):
        MergedReader(dataclasses.replace(lm, tokenizer=None))
