"""Tokenizers trained on a text: round trips, determinism and byte counts."""

import functools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_jax import tokenizers
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.tokenizers.train import train
from atom_jax.training.losses import byte_lengths
from atom_jax.typing import AtomError

TEXT = [b"The cat sat on the mat, and the cats that sat there sat on.\n"] * 20
TEXT += ["Der Käse 12 漢字 漢字\n".encode()] * 5
NAMES = ("bpe:300", "unigram:300")


@functools.cache
def trained(name):
    return train(name, TEXT)


@pytest.fixture(params=NAMES)
def tokenizer(request):
    return trained(request.param)


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text())
@settings(max_examples=60, deadline=None)
def test_any_text_goes_there_and_back_and_its_bytes_are_counted(name, text):
    tokenizer, raw = trained(name), text.encode()
    ids, spans = tokenizer.spans(text)
    assert tokenizer.decode_bytes(ids) == raw
    lengths = byte_lengths(tokenizer, 320)[ids]
    assert lengths.sum() == len(raw) and lengths.tolist() == [b - a for a, b in spans]


def test_names_of_special_tokens_in_a_text_are_text(tokenizer):
    text = b"a <|bos|> and <|eos|><|pad|>"
    ids = tokenizer.encode(text)
    assert ids.min() > 2 and tokenizer.decode_bytes(ids) == text
    assert byte_lengths(tokenizer, tokenizer.vocab_size)[ids].sum() == len(text)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.front) == (0, (1,), 2, (0,))


def test_learns_the_words(tokenizer):
    assert tokenizer.vocab_size <= 300
    ids = tokenizer.encode(b" the cat sat")
    assert len(ids) < 6


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = tokenizers.from_name(tmp_path)
    assert isinstance(again, JsonTokenizer) and again.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(again.encode(b"that cat <|eos|>"), tokenizer.encode(b"that cat <|eos|>"))
    ours, theirs = ((t.bos_id, t.eos_ids, t.pad_id, t.front) for t in (tokenizer, again))
    assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_another_process_makes_the_same(name, tmp_path):
    code = f"from atom_jax.tokenizers.train import train; train({name!r}, {TEXT!r}).save({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "tokenizer.json").read_text("utf-8") == trained(name)._files["tokenizer.json"]


def test_bad_names():
    with pytest.raises(AtomError, match="bpe:258: a trained vocabulary must have at least 259"):
        train("bpe:258", TEXT)
    with pytest.raises(AtomError, match="expected bpe:SIZE, unigram:SIZE or words:SIZE"):
        train("wordpiece:300", TEXT)
