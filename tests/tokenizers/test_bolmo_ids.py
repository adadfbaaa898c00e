"""Bolmo's ids and suffix subwords against the official numbers, and against a search by hand."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax import tokenizers
from atom_jax.tokenizers import BolmoTokenizer, suffix
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.typing import AtomError

TOKENIZER = BolmoTokenizer()


@pytest.fixture(scope="module")
def directory(golden):
    return golden / "bolmo"


@pytest.fixture(scope="module")
def tokenizer(directory):
    return tokenizers.from_name(f"bolmo:{directory / 'subword_tokenizer'}")


def test_ids_and_suffix_subwords_equal_the_official_ones(directory, tokenizer):
    numbers = load_file(directory / "io.safetensors")
    texts = json.loads((directory / "meta.json").read_text())["texts"]
    assert len(texts) == 6
    for name, text in texts.items():
        ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(text)])
        np.testing.assert_array_equal(ids, numbers[f"{name}.input_ids"][0])
        np.testing.assert_array_equal(tokenizer.suffix_ids(ids[None]), numbers[f"{name}.expanded_ids"])
        assert tokenizer.decode(ids) == text


def test_every_subword_is_spelled_as_the_official_one(directory, tokenizer):
    official = np.load(directory / "subword_bytes.npz")
    sequences = np.split(official["flat"], official["offsets"][1:-1])
    for i, sequence in zip(official["subword_id"], sequences):
        # The longest token that ends where a token ends is that token, or a longer one that it ends.
        assert tokenizer.suffix_ids(sequence[None])[0, -1] == i


@pytest.mark.parametrize("n", [0, 1, 40, 3000])
def test_a_search_by_hand_finds_the_same(tokenizer, n):
    """Random pieces of the vocabulary and specials, in two rows: short, and long enough to be read in parts."""
    rng = np.random.default_rng(n)
    spelled = {i: tuple(b + 4 for b in p) for i, p in tokenizer.subwords.pieces.items()}
    bos, pad = tokenizer.subwords.bos_id, tokenizer.subwords.own_pad_id
    spelled |= {bos: (1,), pad: (0,)}
    known = {sequence: i for i, sequence in spelled.items()}
    stream = [s for i in rng.integers(0, 435, 2 * n) for s in spelled[i]]
    ids = np.array(stream[: 2 * n], np.int64).reshape(2, n)
    found = tokenizer.suffix_ids(ids)
    assert found.shape == (2, n) and found.dtype == np.int32
    longest = max(map(len, known))
    for row in range(2):
        for t in range(n):
            ends = (tuple(ids[row, t + 1 - k : t + 1]) for k in range(min(longest, t + 1), 0, -1))
            assert found[row, t] == known[next(end for end in ends if end in known)]


def test_marks_of_patches_and_the_unused_id_change_nothing(tokenizer):
    ids = np.concatenate([[1], tokenizer.encode("Language modeling")])[None]
    plain = tokenizer.suffix_ids(ids)
    np.testing.assert_array_equal(tokenizer.suffix_ids(ids + 260 * (np.arange(ids.shape[1]) % 3 == 0)), plain)
    np.testing.assert_array_equal(np.delete(tokenizer.suffix_ids(np.insert(ids, 5, 3, axis=1)), 5, 1), plain)


def test_a_document_begins_anew(tokenizer):
    ids = np.concatenate([[1], tokenizer.encode("Language"), [1], tokenizer.encode("uage"), [0, 0], [1], [101]])
    found = tokenizer.suffix_ids(ids[None])[0]
    np.testing.assert_array_equal(found[9:14], tokenizer.suffix_ids(ids[None, 9:14])[0])
    assert list(found[[0, 9, 14, 16]]) == [432, 432, 433, 432]


def test_a_vocabulary_of_many_tokens_is_built_fast_and_right():
    rng = np.random.default_rng(0)
    words = {bytes([b]) for b in range(256)}
    words |= {bytes(rng.integers(97, 101, n, dtype=np.uint8)) for n in rng.integers(2, 20, 20_000)}
    pieces = dict(enumerate(sorted(words)))
    tables = suffix.build(pieces)
    ids = rng.integers(97 + 4, 101 + 4, (1, 2000))
    found = tables.out[suffix.states(tables, ids, 19)][0]
    data, known = (ids[0] - 4).astype(np.uint8).tobytes(), {p: i for i, p in pieces.items()}
    for t in range(2000):
        assert found[t] == next(known[e] for k in range(19, 0, -1) if (e := data[max(t + 1 - k, 0) : t + 1]) in known)


def test_bytes_that_no_token_has():
    tables = suffix.build({0: b"a", 3: b"ab", 5: b"<end>"}, bos=5)
    states = suffix.states(tables, np.array([[1, *(b + 4 for b in b"abcba")]]), 2)
    assert tables.out[states].tolist() == [[5, 0, 3, 5, 5, 0]]


def test_text_survives_and_wrong_ids_are_named():
    data = bytes(range(256))
    ids = TOKENIZER.encode(data)
    assert TOKENIZER.decode_bytes(ids) == data and ids[0] == 4
    assert TOKENIZER.decode_bytes(np.concatenate([[1, 0, 2, 3, 261], ids + 260])) == data
    assert TOKENIZER.vocab_size == 520 and TOKENIZER.decode([259]) == "�"
    with pytest.raises(AtomError, match="Token id 520 is outside the byte vocabulary of 520"):
        TOKENIZER.decode([520])
    with pytest.raises(AtomError, match="has no subwords"):
        TOKENIZER.suffix_ids([[1]])


def test_it_is_found_again_by_its_name(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = tokenizers.from_name(f"bolmo:{tmp_path}")
    for a, b in zip(again.tables, tokenizer.tables):
        np.testing.assert_array_equal(a, b)
    assert isinstance(again.subwords, JsonTokenizer)
    assert tokenizers.from_name("bolmo").tables is None
