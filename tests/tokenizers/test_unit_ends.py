"""Unit ends of texts."""

import numpy as np
import pytest

from atom_jax.tokenizers.train import train
from atom_jax.tokenizers.units import unit_ends


class Pieces:
    """Cuts a text into pieces of given lengths."""

    def __init__(self, *lengths):
        ends = np.cumsum(lengths)
        self.cut = np.stack([ends - lengths, ends], axis=1)

    def spans(self, text):
        return np.zeros(len(self.cut), np.int32), self.cut


@pytest.mark.parametrize(
    ("text", "lengths", "ends"),
    [
        ("the cat", (3, 2, 2), "0001100"),
        ("the cat", (4, 3), "0001000"),
        ("cats", (3, 1), "0010"),
        ("a  \n b c", (1, 1, 3, 1, 2), "00001010"),
        (" a", (2,), "10"),
        ("a ", (1, 1), "00"),
        ("é漢", (1, 1, 1, 2), "01000"),
        ("é漢x", (2, 3, 1), "010010"),
    ],
)
def test_unit_ends(text, lengths, ends):
    found = unit_ends(Pieces(*lengths), text.encode())
    assert found.dtype == bool
    assert "".join(map(str, found.astype(int))) == ends


def test_unit_ends_of_a_unigram_tokenizer():
    tokenizer = train("unigram:400", [b"the cat sat on the mat, and the cats sat there\n"] * 20)
    text = b"the cats sat on the mat"
    ends = unit_ends(tokenizer, text)
    spaces = np.frombuffer(text, np.uint8) == 32
    assert ends[spaces].all() and not ends[:-1][spaces[1:]].any() and not ends[-1]
