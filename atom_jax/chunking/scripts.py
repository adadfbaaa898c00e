"""Which script a byte of UTF-8 text belongs to, found on the device from the bytes themselves."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax.chunking.types import last_real, previous
from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError

# First and last value of the bytes that begin a letter: one byte where that is enough to tell, else two (0xE0A4).
# Scripts that share their first bytes (Armenian capitals, accents beyond the Latin blocks) are told apart roughly.
PREFIXES: dict[str, tuple[tuple[int, int], ...]] = {
    "latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC3, 0xCA), (0xE1B8, 0xE1BB)),
    "greek": ((0xCDB0, 0xCDBF), (0xCE, 0xCF), (0xE1BC, 0xE1BF)),
    "cyrillic": ((0xD0, 0xD3), (0xD480, 0xD4AF)),
    "armenian": ((0xD4B1, 0xD4BF), (0xD5, 0xD5), (0xD680, 0xD688)),
    "hebrew": ((0xD7, 0xD7),),
    "arabic": ((0xD8, 0xDB), (0xDD90, 0xDDBF), (0xE0A2, 0xE0A3), (0xEFAD, 0xEFB7), (0xEFB9, 0xEFBB)),
    "devanagari": ((0xE0A4, 0xE0A5),),
    "bengali": ((0xE0A6, 0xE0A7),),
    "tamil": ((0xE0AE, 0xE0AF),),
    "telugu": ((0xE0B0, 0xE0B1),),
    # All nine scripts of India in U+0900-0D7F.
    "indic": ((0xE0A4, 0xE0B5),),
    "sinhala": ((0xE0B6, 0xE0B7),),
    "thai": ((0xE0B8, 0xE0B9),),
    "lao": ((0xE0BA, 0xE0BB),),
    "tibetan": ((0xE0BC, 0xE0BF),),
    "myanmar": ((0xE180, 0xE182),),
    "georgian": ((0xE183, 0xE183),),
    "ethiopic": ((0xE188, 0xE18D),),
    "khmer": ((0xE19E, 0xE19F),),
    "kana": ((0xE381, 0xE383),),
    "han": ((0xE390, 0xE3BF), (0xE4, 0xE9), (0xEFA4, 0xEFAB)),
    "hangul": ((0xE184, 0xE187), (0xEAB0, 0xEABF), (0xEB, 0xEC), (0xED80, 0xED9F)),
}


@struct.dataclass
class ScriptState:
    """Of every row: the script of the latest letter and the latest byte, i32 [b] both."""

    script: jax.Array
    byte: jax.Array

    @classmethod
    def empty(cls, b: int) -> ScriptState:
        """Before the first byte."""
        return cls(jnp.zeros(b, jnp.int32), jnp.zeros(b, jnp.int32))


def check(names: tuple[str, ...]) -> None:
    """Raises AtomError for a script that has no ranges here."""
    for name in names:
        if name not in PREFIXES:
            raise AtomError(f"scripts: unknown script {name!r}; known: {', '.join(PREFIXES)}")


@functools.cache
def _tables(names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Index into `names` or -1: by one byte [256], and by two [65536]. Names given first win where ranges overlap."""
    one, two = np.full(256, -1, np.int8), np.full(65536, -1, np.int8)
    for i in reversed(range(len(names))):
        for first, last in PREFIXES[names[i]]:
            (one if last < 256 else two)[first : last + 1] = i
    return one, two


def scripts_of(
    ids_bt: jax.Array, tokens: Tokens, state: ScriptState, names: tuple[str, ...]
) -> tuple[jax.Array, ScriptState]:
    """Index into `names` of the script of every position, i32 [b, t], and the state after them.

    A position has the script of the latest letter that began in its document, its own included; everything else
    (spaces, digits, punctuation, special ids, letters of other scripts) inherits. At first it is script 0.
    """
    one, two = (jnp.asarray(table) for table in _tables(names))
    first = tokens.positions == 0
    before = jnp.where(first, 0, previous(ids_bt, state.byte))
    byte, is_byte = jnp.minimum(ids_bt, 255), ids_bt < 256
    single = jnp.where(is_byte, jnp.take(one, byte), -1)
    pair = jnp.where(is_byte & (before < 256), jnp.take(two, jnp.minimum(before, 255) * 256 + byte), -1)
    found = jnp.where(single >= 0, single, pair).astype(jnp.int32)
    found = jnp.where(first, jnp.maximum(found, 0), found)
    # The latest position with a script of its own: a running maximum of (position, script) as one number.
    count = len(names)
    index = jnp.arange(1, ids_bt.shape[1] + 1, dtype=jnp.int32)[None] * count
    latest = jax.lax.cummax(jnp.where(found >= 0, index + found, 0), axis=1)
    script = jnp.where(latest > 0, latest % count, state.script[:, None])
    new = ScriptState(last_real(script, tokens, state.script), last_real(ids_bt, tokens, state.byte))
    return script, new
