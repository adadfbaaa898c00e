"""Rows of merged tokens: means of pieces, in a table of fixed size."""

import dataclasses

import numpy as np
import pytest

from atom_jax.tokenizers.dynamic import Merger
from atom_jax.transfer.merged_rows import MergedRows
from atom_jax.typing import AtomError
from tests.transfer.numbers import tokenizer, view

SOURCE = np.random.default_rng(0).normal(size=(700, 2, 4)).astype(np.float32)


def test_rows_are_means_of_pieces():
    tk = tokenizer("gpt2like")
    merged = Merger(tk, "word").merge([tk.encode("a strange stranger, stranger still")])
    rows = MergedRows(view("gpt2like"), SOURCE, capacity=len(merged.pieces))
    for piece, slot in zip(merged.pieces, rows.slots(merged.pieces)):
        np.testing.assert_allclose(
            rows.table[slot], SOURCE[view("gpt2like").cut(piece)].mean(0), rtol=1e-5, atol=1e-6
        )


def test_the_longest_unused_go_first_and_a_batch_keeps_its_own():
    made, cut = [], view("gpt2like").cut

    def counted(piece):
        made.append(piece)
        return cut(piece)

    rows = MergedRows(dataclasses.replace(view("gpt2like"), cut=counted), SOURCE, capacity=3)
    a, b, c, d, e = (b"qx%d" % i for i in range(5))
    assert rows.slots([a, b, a]).tolist() == [0, 1, 0] and made == [a, b]
    assert rows.slots([c, a]).tolist() == [2, 0] and made == [a, b, c]
    # b is the one unused longest; c and a are needed now.
    assert rows.slots([d, c, a]).tolist() == [1, 2, 0] and made == [a, b, c, d]
    assert rows.slots([b, e]).tolist() == [2, 0] and made == [a, b, c, d, b, e]
    for piece, slot in ((d, 1), (b, 2), (e, 0)):
        np.testing.assert_allclose(rows.table[slot], SOURCE[cut(piece)].mean(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(AtomError, match="a batch has 4 merged tokens, the table holds 3"):
        rows.slots([a, b, c, d])


def test_what_has_no_row_is_said():
    with pytest.raises(AtomError, match="capacity: expected at least 1"):
        MergedRows(view("gpt2like"), SOURCE, capacity=0)
    rows = MergedRows(view("gpt2like"), SOURCE[:5])
    with pytest.raises(AtomError, match="is cut into no tokens that have rows"):
        rows.slots([b"qx"])
    assert not rows.table.any() and rows.table.shape == (5000, 2, 4)
