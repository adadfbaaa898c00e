"""How the kernels of `mlstm_chunk` see its arguments: rows of numbers per position, of every head."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mlstm_chunk.ref import Parts, State, padded, sums

BLOCK = 128


class Blocks(NamedTuple):
    """Arguments in whole blocks."""

    rows: jax.Array  # f32 [b, h, 4, long]: sums of log forget gates within block and document, input gates,
    # documents, and 1 where a position belongs to the document of the state before its block.
    q: jax.Array
    k: jax.Array
    v: jax.Array

    @classmethod
    def of(cls, parts: Parts) -> Blocks:
        q, k, v, gate, forget, document = padded(parts, BLOCK)
        b, h, long = gate.shape
        total = block_sums(forget, document)
        ends = jnp.pad(document[:, BLOCK - 1 : -1 : BLOCK], ((0, 0), (1, 0)))
        goes_on = document == jnp.repeat(ends, BLOCK, axis=1)

        def for_heads(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x.astype(jnp.float32)[:, None], (b, h, long))

        return cls(jnp.stack([total, gate, for_heads(document), for_heads(goes_on)], axis=2), q, k, v)

    @property
    def count(self) -> int:
        return self.rows.shape[3] // BLOCK


def block_sums(forget: jax.Array, document: jax.Array) -> jax.Array:
    """`ref.sums` of every block, f32 [b, h, long]."""
    (b, h, long), blocks = forget.shape, forget.shape[2] // BLOCK
    by_block = forget.reshape(b, h, blocks, BLOCK).swapaxes(1, 2).reshape(b * blocks, h, BLOCK)
    total = sums(by_block, document.reshape(b * blocks, BLOCK))
    return total.reshape(b, blocks, h, BLOCK).swapaxes(1, 2).reshape(b, h, long)


def column(row_1j: jax.Array) -> jax.Array:
    """[BLOCK, BLOCK]: a row of one block along rows."""
    return jnp.broadcast_to(row_1j, (BLOCK, BLOCK)).T


def flat(state: State) -> State:
    """C, n and m as matrices: f32 [b, h, k, v], [b, h, 1, k], [b, h, 1, 1]."""
    c, n, m = state
    return c, n[:, :, None], m[:, :, None, None]


def spec(rows: int, lanes: int, along: int | None, blocks: int = 0) -> pl.BlockSpec:
    """Blocks of one head, which go along axis 2 or 3 with the positions, or stay; backwards if `blocks` are given."""

    def index(b: Any, h: Any, j: Any) -> tuple:
        at = blocks - 1 - j if blocks else j
        return (b, h, at if along == 2 else 0, at if along == 3 else 0)

    return pl.BlockSpec((None, None, rows, lanes), index)
