"""Fixed strides, spaces and symbols against the official baselines."""

import itertools

import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax.chunking.rules import fixed, spaces, symbol
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.chunking.rules.spaces import Spaces
from atom_jax.chunking.rules.symbol import Symbol
from atom_jax.chunking.types import Seen
from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError


def mark(module, cfg, ids):
    ids = np.atleast_2d(ids)
    b, t = ids.shape
    tokens = Tokens(np.tile(np.arange(t, dtype=np.int32), (b, 1)), np.ones((b, t), np.int32))
    seen = Seen(np.zeros((b, t, 1), np.float32), tokens, ids.astype(np.int32))
    return np.asarray(module.apply({}, seen, module.init_state(cfg, 1, b), cfg=cfg)[0].mark)


@pytest.fixture(scope="module")
def dynpool(golden):
    return load_file(golden / "dynpool" / "dynpool.safetensors")


def test_fixed_stride(dynpool):
    found = mark(fixed, Fixed(2, phase="dynpool"), dynpool["data"].T)
    np.testing.assert_array_equal(found, dynpool["fixed.boundaries_gt"].T)


def test_blocks_end_with_every_last_position():
    assert np.flatnonzero(mark(fixed, Fixed(3), np.zeros(10))[0]).tolist() == [2, 5, 8]
    assert mark(fixed, Fixed(1), np.zeros(4)).all()


def test_whitespace(dynpool):
    """The official alphabet has its space at 0."""
    found = mark(spaces, Spaces(characters=(0,)), dynpool["data"].T)
    np.testing.assert_array_equal(found, dynpool["whitespaces.boundaries_gt"].T)
    assert np.flatnonzero(mark(spaces, Spaces(), list(b"a bc\n d"))[0]).tolist() == [1, 5]


def test_space_like_bytes(golden):
    """The official ids are bytes from 4 on, special ones before."""
    blt = load_file(golden / "blt" / "blt.safetensors")
    ids = np.where(blt["tokens"] < 4, 256, blt["tokens"] - 4)
    found = np.flatnonzero(mark(spaces, Spaces(style="spacebyte"), ids)[0])
    np.testing.assert_array_equal(np.concatenate([[0], 1 + found]), blt["space.start_ids"][0])


def test_a_word_and_the_space_after_it_are_a_unit():
    text = "Go on, 2 é!".encode()
    found = mark(spaces, Spaces(style="spacebyte"), list(text))[0]
    ends = [0, *(1 + np.flatnonzero(found)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(ends) if a < b]
    assert pieces == [b"Go ", b"on,", b" 2 ", b"\xc3\xa9!"]


def test_symbol():
    assert np.flatnonzero(mark(symbol, Symbol(), [97, 259, 98, 99, 259, 259])[0]).tolist() == [1, 4, 5]


def test_bad_options():
    with pytest.raises(AtomError, match="stride: expected a whole number from 1"):
        Fixed(0)
    with pytest.raises(AtomError, match="phase: expected block or dynpool"):
        Fixed(2, phase="first")
    with pytest.raises(AtomError, match="style: expected whitespace or spacebyte"):
        Spaces(style="comma")
