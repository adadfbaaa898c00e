import re

import numpy as np
import pytest

from atom_jax.evaluation.encode import Encoder, windows
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import AtomError


class Words:
    """A tokenizer of words, each with the spaces before it."""

    vocab_size, bos_id, eos_ids, pad_id = 1000, None, (7,), 0

    def spans(self, text):
        data = text if isinstance(text, bytes) else text.encode()
        found = [m.span() for m in re.finditer(rb" *[^ ]+| +$", data)]
        ids = [100 + sum(data[a:b]) % 900 for a, b in found]
        return np.array(ids, np.int32), np.array(found, np.int32).reshape(-1, 2)

    def encode(self, text):
        return self.spans(text)[0]


CASES = [(10, 1, 20, 3), (50, 1, 8, 4), (50, 1, 8, 8), (50, 1, 8, 1), (50, 30, 9, 4), (9, 1, 8, 4), (30, 28, 8, 4)]


@pytest.mark.parametrize(("n", "start", "length", "context"), CASES)
def test_windows_score_each_token_once_with_enough_context(n, start, length, context):
    ids = np.arange(n, dtype=np.int32)
    scored = []
    for item in windows(ids, start, length, context):
        assert len(item.ids) - 1 <= length
        assert np.array_equal(item.ids, np.arange(item.ids[0], item.ids[0] + len(item.ids)))
        assert item.start >= min(context, item.ids[item.start])
        scored += item.ids[item.start :].tolist()
    assert scored == list(range(start, n))


def test_short_continuation_gets_all_the_context_that_fits():
    (item,) = windows(np.arange(100, dtype=np.int32), 98, 16, 8)
    assert item.ids[0] == 83 and item.start == 15


def test_context_must_fit():
    for context in (0, 9):
        with pytest.raises(AtomError, match="does not fit"):
            windows(np.arange(5, dtype=np.int32), 1, 8, context)


def test_pair_of_bytes():
    piece = Encoder(ByteTokenizer(), 64, True).pair("día", " ñu")
    (item,) = piece.items
    assert item.ids.tolist() == [256, *"día ñu".encode()]
    assert item.start == 1 + len("día".encode())
    assert piece.nbytes == 4 and not piece.cut


def test_front_only_where_asked_or_needed():
    encoder = Encoder(ByteTokenizer(), 64, False)
    assert encoder.pair("ab", "c").items[0].ids.tolist() == [*b"abc"]
    assert encoder.pair("", "c").items[0].ids.tolist() == [256, *b"c"]
    assert Encoder(Words(), 64, False).pair("", "c").items[0].ids[0] == 7


def test_spaces_move_to_the_continuation():
    encoder = Encoder(Words(), 64, False)
    one, other = encoder.pair("go ", "home"), encoder.pair("go", " home")
    assert one.items[0].ids.tolist() == other.items[0].ids.tolist() == Words().encode("go home").tolist()
    assert one.items[0].start == other.items[0].start == 1
    assert one.nbytes == other.nbytes == 5
    blank = encoder.pair("  ", "home")
    assert blank.items[0].start == 1 and blank.nbytes == 6


def test_a_token_across_the_boundary_is_cut():
    words = Words()
    assert len(words.encode("noon")) == 1
    (item,) = Encoder(words, 64, False).pair("no", "on").items
    assert item.ids.tolist() == [*words.encode("no"), *words.encode("on")] and item.start == 1


def test_long_pairs():
    encoder = Encoder(ByteTokenizer(), 16, False)
    piece = encoder.pair("c" * 40, "d" * 5)
    assert piece.cut and len(piece.items) == 1 and piece.items[0].start == 12
    piece = encoder.pair("c" * 4, "d" * 40)
    assert not piece.cut and len(piece.items) > 1 and piece.nbytes == 40
    assert sum(len(i.ids) - i.start for i in piece.items) == 40
    assert not encoder.pair("c" * 4, "d" * 13).cut


def test_document_bytes_add_up():
    text = b"one two three four five six seven"
    for tokenizer in (Words(), ByteTokenizer()):
        items, sizes = Encoder(tokenizer, 4, False).document(text, 2)
        assert sum(sizes) == len(text) and len(items) == len(sizes) > 1
        assert sum(len(i.ids) - i.start for i in items) == len(tokenizer.encode(text))
    items, sizes = Encoder(ByteTokenizer(), 4, False).document(text, 2)
    assert [len(i.ids) - i.start for i in items] == sizes
    assert Encoder(ByteTokenizer(), 4, False).document(b"", 2) == ([], [])


def test_no_front_token():
    words = Words()
    words.eos_ids = ()
    with pytest.raises(AtomError, match="neither bos nor eos"):
        Encoder(words, 8, False).document(b"a b", 2)
