"""n-gram hashes: the published numbers, the same in 64-bit arithmetic, documents, and reading in pieces."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax.chunking import hashing
from atom_jax.nn.attention import Tokens
from atom_jax.nn.conv import remember
from atom_jax.typing import AtomError

SIZE = 500002


def whole(b, t, start=0):
    return Tokens(np.tile(np.arange(start, start + t, dtype=np.int32), (b, 1)), np.ones((b, t), np.int32))


def wide(ids, n, function, size, positions=None):
    """The same in 64-bit arithmetic, of numpy."""
    ids = np.asarray(ids, np.int64)
    index = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    positions = index if positions is None else np.minimum(index, positions)
    total = np.zeros(ids.shape, np.int64)
    for power in range(n):
        back, factor = n - 1 - power, hashing.PRIMES[function] ** power % 2**64
        older = np.pad(ids, [(0, 0), (back, 0)])[:, : ids.shape[1]]
        # Array arithmetic on int64 wraps silently, which is what is wanted.
        total += np.where(positions >= back, older, 0) * np.full((), factor, np.uint64).astype(np.int64)
    return total % size


@pytest.mark.parametrize("function", range(3))
@pytest.mark.parametrize("n", range(3, 9))
def test_published_numbers(golden, function, n):
    blt = load_file(golden / "blt" / "blt.safetensors")
    ids, expected = blt["tokens"], blt[f"hash.f{function}.n{n}"]
    np.testing.assert_array_equal(wide(ids, n, function, SIZE), expected)
    found = hashing.hashed(ids.astype(np.int32), whole(*ids.shape), n, function, SIZE)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [1, 2, 30000, 65537, 2**28 - 1])
def test_64_bits_give_the_same_for_any_size(size):
    ids = np.random.default_rng(size).integers(0, 65536, (2, 50)).astype(np.int32)
    for n, function in ((1, 0), (2, 1), (4, 3), (9, 2)):
        expected = wide(ids, n, function, size)
        assert expected.min() >= 0 and expected.max() < size
        np.testing.assert_array_equal(hashing.hashed(ids, whole(2, 50), n, function, size), expected)


def test_documents_do_not_reach_into_each_other():
    ids = np.random.default_rng(0).integers(0, 256, (1, 12)).astype(np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]], np.int32)
    apart = np.concatenate([wide(x, 4, 1, SIZE) for x in (ids[:, :5], ids[:, 5:])], axis=1)
    np.testing.assert_array_equal(wide(ids, 4, 1, SIZE, positions), apart)
    found = hashing.hashed(ids, Tokens(positions, np.ones_like(positions)), 4, 1, SIZE)
    np.testing.assert_array_equal(found, apart)


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_in_two_calls(cut):
    """With padding after the first call's ids, and more remembered than one hash needs."""
    ids = np.random.default_rng(1).integers(0, 256, (2, 10)).astype(np.int32)
    expected = wide(ids, 4, 0, SIZE)
    first = np.where(np.arange(10) < cut, ids, 77)
    tokens = Tokens(whole(2, 10).positions, np.tile(np.arange(10) < cut, (2, 1)).astype(np.int32))
    before = np.zeros((2, 5), np.int32)
    np.testing.assert_array_equal(hashing.hashed(first, tokens, 4, 0, SIZE, before)[:, :cut], expected[:, :cut])
    before = remember(first, tokens, before)
    second = hashing.hashed(ids[:, cut:], whole(2, 10 - cut, cut), 4, 0, SIZE, before)
    np.testing.assert_array_equal(second, expected[:, cut:])


def test_bad_options():
    ids = np.zeros((1, 3), np.int32)
    with pytest.raises(AtomError, match="function: hash functions are 0 to 3, got 4"):
        hashing.hashed(ids, whole(1, 3), 3, 4, SIZE)
    with pytest.raises(AtomError, match="size: expected a table of 1 to"):
        hashing.hashed(ids, whole(1, 3), 3, 0, 2**28)
    with pytest.raises(AtomError, match="n: expected at least 1"):
        hashing.hashed(ids, whole(1, 3), 0, 0, SIZE)
