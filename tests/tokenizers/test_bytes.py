"""The byte tokenizer: exact both ways, with sentences for what it cannot do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_jax.tokenizers import ByteTokenizer, Tokenizer, from_name
from atom_jax.typing import AtomError

TOKENIZER = ByteTokenizer()


def test_is_a_tokenizer_with_the_agreed_ids():
    assert isinstance(TOKENIZER, Tokenizer)
    assert (TOKENIZER.vocab_size, TOKENIZER.bos_id, TOKENIZER.eos_ids, TOKENIZER.pad_id) == (
        264,
        256,
        (257,),
        258,
    )
    assert isinstance(from_name("bytes"), ByteTokenizer)


@given(st.text())
def test_text_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert TOKENIZER.decode(ids) == text


@given(st.binary())
def test_any_bytes_come_back(data):
    ids = TOKENIZER.encode(data)
    assert TOKENIZER.decode_bytes(ids) == data
    assert TOKENIZER.decode(ids) == data.decode("utf-8", errors="replace")


def test_special_ids_stand_for_no_bytes():
    assert TOKENIZER.decode_bytes([256, 104, 105, 257, 258, 263]) == b"hi"
    assert TOKENIZER.decode([]) == ""


def test_spans_cover_the_utf8_text():
    ids, spans = TOKENIZER.spans("né")
    assert ids.tolist() == [110, 195, 169]
    assert spans.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert spans.dtype == np.int32


@pytest.mark.parametrize("ids", [[-1], [3, 264]])
def test_ids_outside_the_vocabulary(ids):
    with pytest.raises(AtomError, match=f"Token id {ids[-1]} is outside"):
        TOKENIZER.decode(ids)


def test_lone_surrogate():
    with pytest.raises(AtomError, match="lone surrogate at character 2"):
        TOKENIZER.encode("ab\ud800")


def test_save_writes_nothing(tmp_path):
    TOKENIZER.save(tmp_path)
    assert not list(tmp_path.iterdir())
