"""Rows for byteification: subwords of one document and the bytes that they are."""

import contextlib

import numpy as np
import pytest

from atom_jax.data import vocabulary
from atom_jax.data.config import DataConfig
from atom_jax.data.pipeline import make_iterator
from atom_jax.tokenizers import BolmoTokenizer
from atom_jax.typing import AtomError

DOCUMENTS = ("It was nothing extraordinary, said Emma. " * 9, "née – ☃!", "Yes. " * 30)


@pytest.fixture(scope="module")
def tokenizer():
    return BolmoTokenizer(vocabulary.trained_tokenizer("bpe:400", ("austen",)))


@pytest.fixture
def cfg(tmp_path):
    path = tmp_path / "all"
    path.mkdir()
    for i, text in enumerate(DOCUMENTS):
        (path / f"{i}.txt").write_text(text)
    return DataConfig(sources=(str(path),), split="all", seq_len=64, tokens=24, batch_size=1, shuffle=False)


def test_rows_are_the_documents_in_order(cfg, tokenizer):
    end, texts = tokenizer.document_id, [b""]
    with contextlib.closing(make_iterator(cfg, tokenizer)) as data:
        while len(texts) <= len(DOCUMENTS):
            row = {k: a[0] for k, a in next(data).items()}
            n = (row["lengths"] > 0).sum() - 1
            total, spoken = row["lengths"].sum(), row["tokens"][:n]
            assert total <= 64 and row["ids"][0] == 1 and (row["segments"] == (np.arange(64) < total)).all()
            # All tokens of a row have room, and each has its bytes.
            assert (row["tokens"][n:] == end).all() and (row["lengths"][n + 1 :] == 0).all()
            ends = np.cumsum(row["lengths"][: n + 1])
            for token, lo, hi in zip(spoken.tolist(), ends[:-1], ends[1:]):
                expected = b"" if token == end else tokenizer.subwords.pieces[token]
                assert tokenizer.decode_bytes(row["ids"][lo:hi]) == expected
                assert token != end or (row["ids"][lo:hi] == 1).all()
            assert row["loss_mask"].sum() == total - 1
            np.testing.assert_array_equal(row["targets"][: total - 1], row["ids"][1:total])
            np.testing.assert_array_equal(row["suffix"], tokenizer.suffix_ids(row["ids"][None])[0])
            texts[-1] += tokenizer.decode_bytes(row["ids"])
            if end in spoken:
                assert spoken[-1] == end
                texts.append(b"")
            else:
                # The next token had no room, of one kind or the other.
                assert n == 23 or total > 64 - 20
    assert texts[:-1] == [text.encode() for text in DOCUMENTS]


def test_a_state_continues_in_the_middle_of_a_document(cfg, tokenizer):
    with contextlib.closing(make_iterator(cfg, tokenizer)) as data:
        batches = [next(data) for _ in range(2)]
        state = data.get_state()
        batches += [next(data) for _ in range(6)]
    with contextlib.closing(make_iterator(cfg, tokenizer)) as data:
        data.set_state(state)
        for batch in batches[2:]:
            again = next(data)
            assert all((again[k] == a).all() for k, a in batch.items())
    assert state["used"][0] > 0


def test_impossible_sizes_are_refused():
    with pytest.raises(AtomError, match="tokens is 1"):
        DataConfig(tokens=1)
    with pytest.raises(AtomError, match="or more without"):
        DataConfig(tokens=9, marks="unigram:300")
