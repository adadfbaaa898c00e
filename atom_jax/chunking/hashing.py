"""Hashes of the latest n ids at every position, as BLT looks up n-gram embeddings (Pagnoni et al., 2024, section
3.2.1): a polynomial in a large prime over wrapping signed 64-bit integers, modulo the size of a table; in 32-bit
arithmetic, the only kind that JAX has by default."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError

# One prime per hash function, in the published order.
PRIMES = (1000000007, 5915587277, 1500450271, 3267000013)


def hashed(
    ids_bt: jax.Array, tokens: Tokens, n: int, function: int, size: int, before: jax.Array | None = None
) -> jax.Array:
    """Table rows i32 [b, t] in [0, size) of the n ids up to each position; ids in [0, 65535], sizes below 2^28.

    The oldest id has the power 0. Ids before a document's beginning count as 0.
    before: i32 [b, >= n - 1], the ids read in earlier calls, the latest last (see `remember`); None: no earlier call.
    Raises AtomError for an unknown function or such a size.
    """
    _check(n, function, size)
    t = ids_bt.shape[1]
    if before is None:
        before = jnp.zeros((ids_bt.shape[0], n - 1), jnp.int32)
    line = jnp.concatenate([before, ids_bt], axis=1)[:, before.shape[1] - n + 1 :]
    limbs = [jnp.zeros(ids_bt.shape, jnp.uint32) for _ in range(4)]
    for power, factor in enumerate(_powers(n, function)):
        back = n - 1 - power
        word = jnp.where(tokens.positions >= back, line[:, power : power + t], 0).astype(jnp.uint32)
        # Four limbs of 16 bits: a product of two fits 32 bits, and its halves leave room for a sum over the window.
        for i in range(4):
            product = word * np.uint32(factor >> 16 * i & 0xFFFF)
            limbs[i] += product & 0xFFFF
            if i < 3:
                limbs[i + 1] += product >> 16
    for i in range(3):
        limbs[i + 1] += limbs[i] >> 16
        limbs[i] &= 0xFFFF
    limbs[3] &= 0xFFFF
    return _floor_mod(limbs, size)


def _floor_mod(limbs: list[jax.Array], size: int) -> jax.Array:
    """Signed 64-bit numbers, as limbs of 16 bits from the lowest, modulo `size`; four bits at a time, so that a
    remainder below 2^28 and the next digit fit 32 bits."""
    modulus = np.uint32(size)
    rest = jnp.zeros(limbs[0].shape, jnp.uint32)
    for limb in reversed(limbs):
        for shift in (12, 8, 4, 0):
            rest = (rest * np.uint32(16) + (limb >> np.uint32(shift) & 0xF)) % modulus
    # A negative number is the unsigned one less 2^64.
    negative = limbs[3] >> 15 == 1
    return jnp.where(negative, (rest + np.uint32(-(2**64) % size)) % modulus, rest).astype(jnp.int32)


def _powers(n: int, function: int) -> list[int]:
    return [PRIMES[function] ** i % 2**64 for i in range(n)]


def _check(n: int, function: int, size: int) -> None:
    if n < 1:
        raise AtomError(f"n: expected at least 1 id to hash, got {n}")
    if not 0 <= function < len(PRIMES):
        raise AtomError(f"function: hash functions are 0 to {len(PRIMES) - 1}, got {function}")
    if not 1 <= size < 2**28:
        raise AtomError(f"size: expected a table of 1 to {2**28 - 1} rows, got {size}")
