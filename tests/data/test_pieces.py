"""Cutting documents loses nothing and respects characters."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_jax.data.corpus import Spans, Texts
from atom_jax.data.pieces import Pieces, cut

WORDS = st.text(alphabet="ab é漢🙂\n", min_size=1, max_size=700)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4), st.integers(64, 200))
def test_pieces_joined_are_the_documents(texts, piece_bytes):
    documents = [t.encode() for t in texts]
    pieces = Pieces(Texts("test", documents), piece_bytes)
    joined, current = [], None
    for k in range(len(pieces)):
        piece = pieces[k]
        assert piece["text"]
        piece["text"].decode("utf-8")  # no character is cut
        if piece["first"]:
            assert current is None
            current = b""
        current += piece["text"]
        if piece["last"]:
            joined.append(current)
            current = None
    assert joined == documents


def test_pieces_have_about_the_length_asked_for():
    pieces = Pieces(Texts("test", [b"one two three " * 1000]), 1000)
    lengths = [len(pieces[k]["text"]) for k in range(len(pieces))]
    assert len(lengths) == 14
    assert all(abs(n - 1000) < 20 for n in lengths)
    assert abs(pieces.mean_bytes() - 1000) < 5


def test_cut_is_before_the_space_that_ends_a_word():
    assert cut(b"rest of") == 4
    assert cut(b"  two words") == 5
    assert cut("漢字".encode()[1:]) == 2
    assert cut("é".encode()[1:]) == 1
    assert cut(b"") == 0


def test_unknown_sizes_keep_documents_whole():
    corpus = Texts("test", [b"x" * 5000, b"y"])
    corpus.sizes = None
    assert [len(Pieces(corpus, 64)[k]["text"]) for k in (0, 1)] == [5000, 1]


def test_spans_read_inside_their_limits():
    spans = Spans(Texts("test", [b"0123456789"]), [(0, 2, 7)])
    assert spans.sizes.tolist() == [5]
    assert spans.read(0) == b"23456"
    assert spans.read(0, 1, 100) == b"3456"
    assert np.array_equal(Pieces(spans, 64).ends, [1])
