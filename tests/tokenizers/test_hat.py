"""Words of hierarchical autoregressive transformers: the published examples, what bytes survive, and, where it is
installed, the makers' own splitter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_jax.tokenizers import Tokenizer, from_name
from atom_jax.tokenizers.hat import HatTokenizer, split
from atom_jax.typing import AtomError

TOKENIZER = HatTokenizer()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, world!", ["Hello,", " world!"]),
        ("two  spaces", ["two", "  ", "spaces"]),
        ("camelCase HTMLPage", ["camel", "Case", " HTMLPage"]),
        ("don't 3.14", ["don'", "t", " 3.", "14"]),
        ("x = [1,2];", ["x", " =", " [", "1,", "2];"]),
        ("a\r\n\n b", ["a", "\r\n", "\n", " b"]),
        ("a\n!", ["a", "\n", "!"]),
        (" , b", [" ,", " b"]),
        ("日本 テスト", ["日", "本", " テスト"]),
        ("né e\u0301té", ["né", " e\u0301té"]),
        ("🇩🇪🇫 👩\u200d👧", ["🇩🇪", "🇫", " 👩\u200d👧"]),
        ("\u0301a", ["\u0301", "a"]),
        ("", []),
        (" ", [" "]),
    ],
)
def test_words(text, words):
    assert split(text) == words


def test_is_a_tokenizer_with_the_byte_ids_and_a_word_end():
    assert isinstance(TOKENIZER, Tokenizer)
    assert isinstance(from_name("hat"), HatTokenizer)
    assert (TOKENIZER.name, TOKENIZER.vocab_size, TOKENIZER.word_end_id) == ("hat", 264, 259)
    assert (TOKENIZER.bos_id, TOKENIZER.eos_ids, TOKENIZER.pad_id, TOKENIZER.front) == (256, (257,), 258, (256,))


def test_ids_and_spans():
    ids, spans = TOKENIZER.spans("é, b")
    assert ids.tolist() == [0xC3, 0xA9, 0x2C, 259, 0x20, 0x62, 259]
    assert spans.tolist() == [[0, 1], [1, 2], [2, 3], [3, 3], [3, 4], [4, 5], [5, 5]]
    assert (ids.dtype, spans.dtype) == (np.int32, np.int32)
    ids, spans = TOKENIZER.spans("")
    assert ids.shape == (0,) and spans.shape == (0, 2)


@given(st.text())
def test_text_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert "".join(split(text)) == text
    assert all(split(text))


@given(st.binary())
def test_any_bytes_come_back(data):
    assert TOKENIZER.decode_bytes(TOKENIZER.encode(data)) == data


def test_lone_surrogate():
    with pytest.raises(AtomError, match="lone surrogate at character 1"):
        TOKENIZER.encode("a\ud800")


LETTERS = [*"aBcD  \n\r\t.'-_12é日テの한اдД\u00a0“”…,:/$°ßא\"ไก\u3000\u2028👩🇫"]
LETTERS += ["  ", "e\u0301", "🇩🇪", "'s"]


def test_equal_to_the_makers_splitter():
    splitter = pytest.importorskip("hat_splitter", reason="the package hat-splitter is not installed").HATSplitter()
    rng = np.random.default_rng(0)
    for _ in range(3000):
        text = "".join(rng.choice(LETTERS, rng.integers(1, 12)))
        assert split(text) == splitter.split(text), ascii(text)
