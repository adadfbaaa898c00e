"""Marks of unit ends in packed batches."""

import dataclasses
import json

import numpy as np
import pytest

from atom_jax.data.config import DataConfig
from atom_jax.data.packing import piece_tokens
from atom_jax.data.pipeline import make_iterator
from atom_jax.data.vocabulary import trained_tokenizer
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.tokenizers.units import unit_ends
from atom_jax.typing import AtomError

WORDS = "the cats and the dogs sat on mats and the mats sat under the cats"


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    path = tmp_path_factory.mktemp("marks") / "a.jsonl"
    lines = [json.dumps({"text": f"{WORDS} {i} " * (1 + i % 7)}) for i in range(40)]
    path.write_text("\n".join(lines))
    return DataConfig((str(path),), seq_len=48, batch_size=4, marks="unigram:300", piece_bytes=100)


def test_batches_mark_the_ends_of_units(cfg):
    plain = make_iterator(dataclasses.replace(cfg, marks=""), ByteTokenizer())
    marked = make_iterator(cfg, ByteTokenizer())
    found = []
    for _ in range(6):
        batch, expected = next(marked), next(plain)
        assert set(batch) - set(expected) == {"marks"} and batch["marks"].dtype == bool
        for key, value in expected.items():
            np.testing.assert_array_equal(batch[key], value)
        # Spaces end units, the bytes before them do not; bos and eos are no units.
        space = batch["ids"] == 32
        inside = batch["segments"][:, 1:] == batch["segments"][:, :-1]
        followed = inside & (batch["ids"][:, 1:] < 256)
        assert batch["marks"][:, :-1][space[:, :-1] & followed].all()
        assert not batch["marks"][:, :-1][space[:, 1:] & inside].any()
        assert not batch["marks"][batch["ids"] > 255].any()
        found.append(batch["marks"].mean())
    assert 0.1 < np.mean(found) < 0.9


def test_resume_keeps_the_marks_with_their_tokens(cfg):
    iterator = make_iterator(cfg, ByteTokenizer())
    for _ in range(3):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(4)]
    again = make_iterator(cfg, ByteTokenizer())
    again.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(again)["marks"], batch["marks"])
    with pytest.raises(AtomError, match="saved with marks='unigram:300'"):
        make_iterator(dataclasses.replace(cfg, marks="unigram:299"), ByteTokenizer()).set_state(state)


def test_without_marks_nothing_is_added(cfg):
    iterator = make_iterator(dataclasses.replace(cfg, marks=""), ByteTokenizer())
    assert "marks" not in next(iterator) and "marks" not in iterator.get_state()["config"]


def test_marks_of_longer_tokens(cfg):
    units = trained_tokenizer(cfg.marks, cfg.sources)
    tokens = trained_tokenizer("bpe:280", cfg.sources)
    text = WORDS.encode()
    ids, marks, *_ = piece_tokens({"text": text, "first": True, "last": True}, tokens, units)
    last = np.cumsum([len(tokens.decode_bytes([i])) for i in ids[1:-1]]) - 1
    assert len(marks) == len(ids) < len(text) and not marks[[0, -1]].any()
    np.testing.assert_array_equal(marks[1:-1], unit_ends(units, text)[last])
