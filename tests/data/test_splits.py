"""Splits are disjoint, complete and stable."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_jax.data.corpus import Texts
from atom_jax.data.splits import SplitIndices, name_split, take_split

SPLITS = ("train", "validation", "test")


@given(st.integers(20, 500))
def test_indices_are_a_partition(n):
    parts = [list(SplitIndices(n, split)) for split in SPLITS]
    assert sorted(itertools.chain(*parts)) == list(range(n))
    assert all(part == sorted(part) for part in parts)
    assert len(parts[1]) == len(parts[2]) == n // 20


def test_appending_moves_no_whole_block():
    assert list(SplitIndices(1000, "test"))[:5] == list(SplitIndices(100, "test"))
    assert len({i % 20 for i in SplitIndices(1000, "validation")}) > 10  # not every 20th document


def test_index_out_of_range():
    with pytest.raises(IndexError):
        SplitIndices(40, "test")[2]


@given(st.lists(st.text(alphabet="ab é漢\n", min_size=1, max_size=900), min_size=1, max_size=19))
def test_few_documents_are_split_inside(texts):
    corpus = Texts("test", [t.encode() for t in texts])
    parts = []
    for split in SPLITS:
        part = take_split(corpus, split)
        parts += [(part.spans[i], part.read(i)) for i in range(len(part))]
    whole = b"".join(text for _, text in sorted(parts))
    assert whole == b"".join(corpus.texts)
    for _, text in parts:
        text.decode("utf-8")
    assert take_split(corpus, "all") is corpus


def test_named_split_is_fixed():
    splits = [name_split(f"{i}.py") for i in range(2000)]
    assert splits[:3] == [name_split("0.py"), name_split("1.py"), name_split("2.py")]
    assert 60 < splits.count("validation") < 140
    assert 60 < splits.count("test") < 140
