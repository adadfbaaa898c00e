"""Images with their classes, as documents."""

import numpy as np
import pytest

from atom_jax.data.images import labelled
from atom_jax.data.sources import open_source
from atom_jax.typing import AtomError


def test_numerals_are_the_same_wherever_they_are_read():
    train = open_source("labelled:numerals:size=8", "train")
    assert len(train) == 20_000 and set(map(int, train.sizes[:3])) == {65}
    one = train.read(7)
    assert len(one) == 65 and one[64] < 10 and one == open_source("labelled:numerals:size=8", "train").read(7)
    assert train.read(7, 60, 64) == one[60:64]
    assert train.crc != open_source("labelled:numerals:size=8", "test").crc
    whole = open_source("labelled:numerals:size=8", "all")
    for split, at in (("train", 7), ("validation", 20_007), ("test", 21_007)):
        assert whole.read(at) == open_source("labelled:numerals:size=8", split).read(7)


def test_every_numeral_is_drawn_in_many_ways():
    found = [labelled.Numerals(12).read("test", i) for i in range(60)]
    assert {label for _, label in found} == set(range(10))
    assert len({pixels.tobytes() for pixels, _ in found}) == 60
    assert all(pixels.shape == (12, 12) and pixels.max() > 100 for pixels, _ in found)


def test_digits_are_split_once():
    pytest.importorskip("sklearn", reason="labelled:digits needs the extra [vision]")
    splits = {name: open_source("labelled:digits:size=8", name) for name in ("train", "validation", "test", "all")}
    assert [len(found) for found in splits.values()] == [1000, 200, 597, 1797]
    parts = [splits[name].read(i) for name in ("train", "validation", "test") for i in range(len(splits[name]))]
    assert parts == [splits["all"].read(i) for i in range(1797)]
    pixels, labels = labelled.arrays("digits:size=16", "validation")
    assert pixels.shape == (200, 16, 16, 1) and pixels.max() == 1.0 and pixels.dtype == np.float32
    assert np.bincount(labels).min() > 5
    np.testing.assert_array_equal(pixels[:, ::2, ::2], pixels[:, 1::2, 1::2])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("labelled:cats", "labelled:cats: expected one of digits, numerals"),
        ("labelled:digits:size=12", "labelled:digits: size 12 is no multiple of 8"),
        ("labelled:numerals:high=3", "no field 'high'; valid names here: size"),
        ("labelled:numerals:size=3", "size: expected a whole number from 8 to 512, got 3"),
    ],
)
def test_sources_that_are_none(source, message):
    with pytest.raises(AtomError, match=message):
        open_source(source, "train")
